-- Takes what is due, for a while. KEYS: {endings}:due. ARGV: now, when they are due again, how many at most.
-- Answer: the members.
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])
for _, member in ipairs(due) do redis.call('ZADD', KEYS[1], ARGV[2], member) end
return due
