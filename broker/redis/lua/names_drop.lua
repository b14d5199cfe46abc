-- Remove some buckets, the last first, of a deleted app.
-- KEYS: base of the buckets. ARGV: at most so many. Answer: how many went.
-- repeatable
-- include buckets
local base = KEYS[1]
local n, gone = count_buckets(base), 0
for i = n - 1, math.max(0, n - tonumber(ARGV[1])), -1 do
  gone = gone + redis.call('UNLINK', base .. i)
  n = i
end
if n > 1 then redis.call('SET', base, n) else redis.call('DEL', base) end
return gone
