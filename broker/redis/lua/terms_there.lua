-- Which terms hold for a device of a partition.
-- KEYS: the posting pieces. ARGV: terms. Answer: 1 or 0 for each.
-- reads only
local found = {}
for i, term in ipairs(ARGV) do found[i] = redis.call('HEXISTS', KEYS[1], term) end
return found
