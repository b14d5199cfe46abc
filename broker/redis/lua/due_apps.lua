-- The apps that have due records of one kind, each with a time that is not above its earliest.
-- KEYS: {due:<kind>}:apps (sorted set), :touches (hash, app -> its last touch), :count (of touches, ever).
-- ARGV[1]: "touch", app, due: note that it will have one; answers the number of this touch.
--          "list", now, limit: answers app, time, touch, app, …, earliest first.
--          "raise", app, touch, due or "": it has none before; answers 0, and nothing changes, if it was touched since.
-- repeatable
local act, app = ARGV[1], ARGV[2]
if act == 'touch' then
  local touch = redis.call('INCR', KEYS[3])
  redis.call('HSET', KEYS[2], app, touch)
  redis.call('ZADD', KEYS[1], 'LT', ARGV[3], app)
  return touch
end
if act == 'list' then
  local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[2], 'WITHSCORES', 'LIMIT', 0, ARGV[3])
  local answer = {}
  for i = 1, #found, 2 do
    answer[#answer + 1] = found[i]
    answer[#answer + 1] = found[i + 1]
    answer[#answer + 1] = redis.call('HGET', KEYS[2], found[i])
  end
  return answer
end
if redis.call('HGET', KEYS[2], app) ~= ARGV[3] then return 0 end
if ARGV[4] == '' then
  redis.call('ZREM', KEYS[1], app)
  redis.call('HDEL', KEYS[2], app)
else
  redis.call('ZADD', KEYS[1], ARGV[4], app)
end
return 1
