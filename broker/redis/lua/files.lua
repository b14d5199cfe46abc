-- The files of one app. KEYS[1]: <tag>:files, a hash: file id -> number of its pieces (0: not complete), a blank, when it
-- was noted.
-- ARGV[1]: tag; ARGV[2]: "note", file, pieces, now: answers 1, or {"refused", "deleted", tag}.
--          "orphans", before: answers the ids of those noted before that no record makes exist.
-- repeatable
local tag = ARGV[1]
if ARGV[2] == 'note' then
  if redis.call('EXISTS', tag .. ':deleted') == 1 then return { 'refused', 'deleted', tag } end
  redis.call('HSET', KEYS[1], ARGV[3], ARGV[4] .. ' ' .. ARGV[5])
  return 1
end
local orphans = {}
local files = redis.call('HGETALL', KEYS[1])
for i = 1, #files, 2 do
  local noted = tonumber(string.match(files[i + 1], ' (.*)$'))
  if noted < tonumber(ARGV[3]) and redis.call('HEXISTS', tag .. ':rec:file', files[i]) == 0 then
    orphans[#orphans + 1] = files[i]
  end
end
return orphans
