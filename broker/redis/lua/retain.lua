-- Sets and removes retained messages of one app.
-- KEYS[1]: <tag>:retained, a hash. ARGV: tag; writer; number of the call, which grows with each of this writer; number of
-- the writer's node; now; then topic, packed ("" removes it), expires_at or "", three of each.
-- <tag>:retained:over is a sorted set: topic -> expires_at.
-- Answer: 1; 0 if a later call of the writer was stored before, -1 if another node is the app's home: nothing was
-- changed. A deleted app has none.
-- repeatable
local tag, number = ARGV[1], tonumber(ARGV[3])
if redis.call('EXISTS', tag .. ':deleted') == 1 then return 1 end
if (redis.call('GET', tag .. ':home') or ARGV[4]) ~= ARGV[4] and ARGV[4] ~= '0' then return -1 end
local last = tag .. ':retained:by:' .. ARGV[2]
if number < tonumber(redis.call('GET', last) or 0) then return 0 end
redis.call('SET', last, ARGV[3], 'PX', 3600000)
local over = tag .. ':retained:over'
for i = 6, #ARGV, 3 do
  local topic, packed, expires_at = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if packed == '' then
    redis.call('HDEL', KEYS[1], topic)
  else
    redis.call('HSET', KEYS[1], topic, packed)
  end
  if expires_at == '' then
    redis.call('ZREM', over, topic)
  else
    redis.call('ZADD', over, expires_at, topic)
  end
end
for _, topic in ipairs(redis.call('ZRANGEBYSCORE', over, '-inf', ARGV[5], 'LIMIT', 0, 100)) do
  redis.call('HDEL', KEYS[1], topic)
  redis.call('ZREM', over, topic)
end
return 1
