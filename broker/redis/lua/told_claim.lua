-- Claims callback events of one app that are due: they are due again later.
-- KEYS: <tag>:told (see told_change.lua). ARGV: tag; now; when they are due again; how many at most; a touch to close, or "".
-- Answer: how many more are due; the earliest time, or ""; how many are parked; number, packed event, … of the claimed, those
-- due longest. For a deleted app: nothing. After a touch was closed nothing changes that was prepared at it or before.
local dues = KEYS[1] .. ':due'
if redis.call('EXISTS', ARGV[1] .. ':deleted') == 1 then return { 0, '', 0 } end
if ARGV[5] ~= '' and tonumber(ARGV[5]) > tonumber(redis.call('GET', KEYS[1] .. ':fence') or 0) then
  redis.call('SET', KEYS[1] .. ':fence', ARGV[5])
end
local answer = { 0, '', redis.call('ZCARD', KEYS[1] .. ':parked') }
for _, number in ipairs(redis.call('ZRANGEBYSCORE', dues, '-inf', ARGV[2], 'LIMIT', 0, ARGV[4])) do
  redis.call('ZADD', dues, ARGV[3], number)
  answer[#answer + 1] = number
  answer[#answer + 1] = redis.call('HGET', KEYS[1], number)
end
answer[1] = redis.call('ZCOUNT', dues, '-inf', ARGV[2])
answer[2] = redis.call('ZRANGE', dues, 0, 0, 'WITHSCORES')[2] or ''
return answer
