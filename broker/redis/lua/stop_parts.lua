-- Raises the version of the records that say when parts of a push are let go, so that whoever read them has to look again.
-- KEYS: <tag>:rec:<kind> of each kind (see records.lua). ARGV: the push.
for _, key in ipairs(KEYS) do
  local packed = redis.call('HGET', key, ARGV[1])
  if packed then
    local version = struct.unpack('>I4', packed)
    redis.call('HSET', key, ARGV[1], struct.pack('>I4', version + 1) .. string.sub(packed, 5))
  end
end
return #KEYS
