-- Takes the first ids out of a bucket, unless somebody else did.
-- KEYS: <tag>:over:<time>. ARGV: how many; the first of them. Answer: how many are left.
-- repeatable
if redis.call('LINDEX', KEYS[1], 0) == ARGV[2] then redis.call('LTRIM', KEYS[1], ARGV[1], -1) end
return redis.call('LLEN', KEYS[1])
