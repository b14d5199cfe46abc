-- The newest-N rule, for devices whose route is one of a dead node.
-- KEYS[1]: {a.p}:top. ARGV: limit; the time (8 bytes); offset u16, node u32 each: whoever has another route by now is left
-- alone. Answer: what was evicted in this partition and is not recorded yet, as put.lua gives it.
-- repeatable
local prefix = string.sub(KEYS[1], 1, -4)
-- include inboxes
local limit, time, devices, gone = tonumber(ARGV[1]), ARGV[2], ARGV[3], {}
for at = 1, #devices, 6 do
  local offset = struct.unpack(">I2", devices, at)
  if redis.call("GETRANGE", prefix .. "routes", offset * 12, offset * 12 + 3) == string.sub(devices, at + 2, at + 5) then
    local key, field = inbox(offset)
    local value, evicted = newest(redis.call("HGET", key, field) or "", limit, offset)
    if evicted ~= "" then
      keep(key, field, value)
      gone[#gone + 1] = evicted
    end
  end
end
note_evicted(time, gone)
return redis.call("LRANGE", prefix .. "evicted", 0, -1)
