-- What is kept for some names.
-- KEYS: base of the buckets. ARGV: names. Answer: their values, false where there is none.
-- reads only
-- include buckets
local base, found = KEYS[1], {}
local n = count_buckets(base)
for i, name in ipairs(ARGV) do
  found[i] = redis.call('HGET', bucket_of(base, name, n), name)
end
return found
