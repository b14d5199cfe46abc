-- Who was there in a stretch of time.
-- KEYS: the hash of one app, kind and chunk. ARGV: from, to. Answer: field, value, … of the hours and days that touch it.
-- reads only
local first, last, found = tonumber(ARGV[1]), tonumber(ARGV[2]), {}
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  local width, start = string.match(field, '^(%d+):(-?%d+)$')
  if tonumber(start) < last and tonumber(start) + tonumber(width) > first then
    found[#found + 1] = field
    found[#found + 1] = redis.call('HGET', KEYS[1], field)
  end
end
return found
