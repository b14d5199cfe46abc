-- Sets and removes items of durable MQTT sessions of one app, all or none (S11).
-- KEYS[1]: <tag>:sessions, a hash. ARGV: tag; writer; number of the call, which grows with each of this writer; number of
-- the writer's node; how many are set; field, value, field, value, …; then the fields to remove.
-- Answer: 1; 0 if a later call of the writer was stored before, -1 if another node is the app's home: nothing was
-- changed. Items of a deleted app are dropped.
-- repeatable
local tag, number, sets = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[5])
if redis.call('EXISTS', tag .. ':deleted') == 1 then return 1 end
if (redis.call('GET', tag .. ':home') or ARGV[4]) ~= ARGV[4] and ARGV[4] ~= '0' then return -1 end
local last = tag .. ':sessions:by:' .. ARGV[2]
if number < tonumber(redis.call('GET', last) or 0) then return 0 end
redis.call('SET', last, ARGV[3], 'PX', 3600000)
local first_removed = 6 + 2 * sets
for i = 6, first_removed - 1, 1000 do
  redis.call('HSET', KEYS[1], unpack(ARGV, i, math.min(i + 999, first_removed - 1)))
end
for i = first_removed, #ARGV, 1000 do
  redis.call('HDEL', KEYS[1], unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
return 1
