-- Notes that a message is a part of another, before its row is written.
-- KEYS: <tag of the whole>:parts. ARGV: its id, its lifetime in ms.
-- repeatable
redis.call('SADD', KEYS[1], ARGV[1])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
