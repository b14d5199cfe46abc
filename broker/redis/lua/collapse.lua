-- Notes a push with a collapse key, and answers who else has it.
-- KEYS: <tag>:wide:<key> (sorted set: broadcasts and wholes by their end); <tag>:near:<key> (others, by their id).
-- ARGV: "wide" or "near", its id, its end, now, how many are remembered of each, milliseconds that it is.
-- Answer: the wide ones; the near ones, newest first.
-- repeatable
local own = ARGV[1] == 'wide' and KEYS[1] or KEYS[2]
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[4])
local answer = { redis.call('ZRANGE', KEYS[1], 0, -1), redis.call('ZREVRANGE', KEYS[2], 0, -1) }
redis.call('ZADD', own, ARGV[1] == 'wide' and ARGV[3] or ARGV[2], ARGV[2])
redis.call('ZREMRANGEBYRANK', own, 0, -1 - ARGV[5])
if redis.call('PTTL', own) < tonumber(ARGV[6]) then redis.call('PEXPIRE', own, ARGV[6]) end
return answer
