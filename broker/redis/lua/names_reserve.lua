-- Give names a value that have none. May be repeated.
-- KEYS: base of the buckets. ARGV: name, value, name, value, … Answer: the value that each has now.
-- repeatable
-- include buckets
local base, found = KEYS[1], {}
local n = count_buckets(base)
for i = 1, #ARGV, 2 do
  local key = bucket_of(base, ARGV[i], n)
  if redis.call('HSETNX', key, ARGV[i], ARGV[i + 1]) == 1 then
    found[#found + 1] = ARGV[i + 1]
    n = make_room(base, key, n)
  else
    found[#found + 1] = redis.call('HGET', key, ARGV[i])
  end
end
return found
