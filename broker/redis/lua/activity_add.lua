-- More devices that were there.
-- KEYS: the hash of one app, kind and chunk. ARGV: field, entry, field, entry, … Answer: how long each value is now.
-- repeatable
local lengths = {}
for i = 1, #ARGV, 2 do
  local value = (redis.call('HGET', KEYS[1], ARGV[i]) or '') .. ARGV[i + 1]
  redis.call('HSET', KEYS[1], ARGV[i], value)
  lengths[#lengths + 1] = #value
end
return lengths
