-- Set a field of an app, if there is such an app.
-- KEYS: the app's hash. ARGV: field, value; none: only look. Answer: all of it, as HGETALL does; empty if there is none.
-- repeatable
if ARGV[1] and redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return redis.call('HGETALL', KEYS[1])
