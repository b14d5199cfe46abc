-- Writes a row, once. KEYS: <tag>:row. ARGV: the row, its lifetime in ms. Answer: 1 if it was not there.
-- repeatable
return redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) and 1 or 0
