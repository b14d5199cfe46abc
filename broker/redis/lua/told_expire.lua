-- Forgets callback events of one app that are old: that nobody claimed, or that are parked, since then.
-- KEYS: <tag>:told (see told_change.lua). ARGV: since when; how many of each kind at most. Answer: how many went.
-- repeatable
local told, dues, parked = KEYS[1], KEYS[1] .. ':due', KEYS[1] .. ':parked'
local gone = 0

local function drop(number)
  redis.call('ZREM', dues, number)
  redis.call('ZREM', parked, number)
  gone = gone + redis.call('HDEL', told, number)
end

for _, number in ipairs(redis.call('ZRANGEBYSCORE', dues, '-inf', ARGV[1], 'LIMIT', 0, ARGV[2])) do drop(number) end
for _, number in ipairs(redis.call('ZRANGE', parked, 0, ARGV[2] - 1)) do
  local _, at = struct.unpack('>I4d', redis.call('HGET', told, number))
  if at > tonumber(ARGV[1]) then break end
  drop(number)
end
return gone
