-- Puts ids into a bucket. KEYS: <tag>:over:<time>. ARGV: its lifetime in ms, ids. Answer: how many are in it.
-- repeatable
local count = redis.call('RPUSH', KEYS[1], unpack(ARGV, 2))
if count == #ARGV - 1 then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return count
