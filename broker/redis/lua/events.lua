-- Appends to a log and gives the entries growing ids, whatever the writers' clocks say.
-- KEYS[1]: the log, a stream; its entries have the id <id>-0 and one field. KEYS[2]: the last id that was given.
-- ARGV: tag of the app; the least id for entries of now; ids below this one are over; the log's lifetime in
-- milliseconds; the entries.
-- Answer: the first id, or {"refused", "deleted", tag}.
if redis.call('EXISTS', ARGV[1] .. ':deleted') == 1 then return { 'refused', 'deleted', ARGV[1] } end
local first = math.max(tonumber(ARGV[2]), tonumber(redis.call('GET', KEYS[2]) or 0) + 1)
for i = 5, #ARGV do
  redis.call('XADD', KEYS[1], 'MINID', '~', ARGV[3], string.format('%.0f-0', first + i - 5), 'e', ARGV[i])
end
redis.call('SET', KEYS[2], string.format('%.0f', first + #ARGV - 5))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return first
