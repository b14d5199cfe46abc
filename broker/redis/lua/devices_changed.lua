-- Devices of some partitions were changed; and token generations grew.
-- KEYS: partition -> version of its last change (sorted set, with the newest version as member v), generations.
-- ARGV: partitions (decimal, with blanks between); devno, generation, devno, generation, …   Answer: the version.
-- repeatable
local version = redis.call('ZINCRBY', KEYS[1], 1, 'v')
for partition in string.gmatch(ARGV[1], '%d+') do
  redis.call('ZADD', KEYS[1], version, partition)
end
for i = 2, #ARGV, 2 do
  local known = tonumber(redis.call('HGET', KEYS[2], ARGV[i]) or 0)
  if tonumber(ARGV[i + 1]) > known then redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
end
return version
