-- Set a field of an app, if there is such an app.
-- KEYS: the app's hash. ARGV: field, value, and what it must have been ('': not set); the last may be left out, and
-- all of them, to look only. Answer: all of it, as HGETALL does; empty if there is none.
-- repeatable
if ARGV[1] and redis.call('EXISTS', KEYS[1]) == 1 then
  if not ARGV[3] or (redis.call('HGET', KEYS[1], ARGV[1]) or '') == ARGV[3] then
    redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
  end
end
return redis.call('HGETALL', KEYS[1])
