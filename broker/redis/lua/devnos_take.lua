-- The next devnos of an app.
-- KEYS: the counter, when each partition was begun (sorted set), deleted. ARGV: how many, now.
-- Answer: the first, or -1 if the app was deleted. One more partition for each 4,096.
-- repeatable
if redis.call('EXISTS', KEYS[3]) == 1 then return -1 end
local next = redis.call('INCRBY', KEYS[1], ARGV[1])
local first = next - tonumber(ARGV[1])
for partition = math.ceil(first / 4096), math.ceil(next / 4096) - 1 do
  redis.call('ZADD', KEYS[2], 'NX', ARGV[2], string.format('%07d', partition))
end
return first
