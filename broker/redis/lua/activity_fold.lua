-- Replace the beginnings of some values by their union, unless somebody else did.
-- KEYS: the hash of one app, kind and chunk. ARGV: field of the union, its entry; then for each value: field, bytes of
-- the beginning, their SHA-1. Answer: 1 if it was done.
local rests = {}
for i = 3, #ARGV, 3 do
  local value, size = redis.call('HGET', KEYS[1], ARGV[i]) or '', tonumber(ARGV[i + 1])
  if redis.sha1hex(string.sub(value, 1, size)) ~= ARGV[i + 2] then return 0 end
  rests[ARGV[i]] = string.sub(value, size + 1)
end
for field, rest in pairs(rests) do
  if rest == '' then redis.call('HDEL', KEYS[1], field) else redis.call('HSET', KEYS[1], field, rest) end
end
redis.call('HSET', KEYS[1], ARGV[1], (redis.call('HGET', KEYS[1], ARGV[1]) or '') .. ARGV[2])
return 1
