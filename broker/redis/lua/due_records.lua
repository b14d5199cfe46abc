-- The due records of one app and kind.
-- KEYS[1]: <tag>:due:<kind>. ARGV: tag; kind; now; how many at most; a touch to close, or "".
-- Answer: the earliest due time ("" if there is none, also for a deleted app), then key, packed record, … of those that
-- are due, oldest first. After a touch was closed no change is made that was prepared at it or before (records.py).
-- repeatable
local tag, kind = ARGV[1], ARGV[2]
if redis.call('EXISTS', tag .. ':deleted') == 1 then return { '' } end
if ARGV[5] ~= '' and tonumber(ARGV[5]) > tonumber(redis.call('HGET', tag .. ':fence', kind) or 0) then
  redis.call('HSET', tag .. ':fence', kind, ARGV[5])
end
local answer = { redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2] or '' }
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[3], 'LIMIT', 0, ARGV[4])) do
  answer[#answer + 1] = key
  answer[#answer + 1] = redis.call('HGET', tag .. ':rec:' .. kind, key)
end
return answer
