-- All names and their values.
-- KEYS: base of the buckets. Answer: name, value, name, value, …
-- reads only
-- include buckets
local base, found = KEYS[1], {}
for i = 0, count_buckets(base) - 1 do
  for _, word in ipairs(redis.call('HGETALL', base .. i)) do
    found[#found + 1] = word
  end
end
return found
