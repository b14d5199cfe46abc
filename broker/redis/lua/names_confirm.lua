-- Names are in use. May be repeated.
-- KEYS: base of the buckets. ARGV: name, value, name, value, … of names that were reserved.
-- repeatable
-- include buckets
local base = KEYS[1]
local n = count_buckets(base)
for i = 1, #ARGV, 2 do
  redis.call('HSET', bucket_of(base, ARGV[i], n), ARGV[i], ARGV[i + 1])
end
return 0
