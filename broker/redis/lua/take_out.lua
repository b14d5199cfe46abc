-- Takes messages out of inboxes of one partition.
-- KEYS[1]: {a.p}:top. ARGV: node ("": whoever has the route); for each device: offset u16, count u16, msg_ids u64.
-- Answer: offset u16, node u32 of those that are left as they are, because their route is another node's.
-- repeatable
local prefix, node = string.sub(KEYS[1], 1, -4), ARGV[1]
-- include inboxes
local devices, refused, at = ARGV[2], {}, 1
while at <= #devices do
  local offset, count = struct.unpack(">I2I2", devices, at)
  local name, gone = string.sub(devices, at, at + 1), {}
  for entry = at + 4, at + 8 * count - 4, 8 do
    gone[string.sub(devices, entry, entry + 7)] = true
  end
  at = at + 4 + 8 * count
  local route = node ~= "" and redis.call("GETRANGE", prefix .. "routes", offset * 12, offset * 12 + 3) or ""
  if route ~= "" and route ~= node and route ~= "\0\0\0\0" then
    refused[#refused + 1] = name .. route
  else
    local key, field = inbox(offset)
    local value, left = redis.call("HGET", key, field) or "", {}
    for entry = 1, #value, 12 do
      if not gone[string.sub(value, entry, entry + 7)] then
        left[#left + 1] = string.sub(value, entry, entry + 11)
      end
    end
    if #left * 12 ~= #value then
      keep(key, field, table.concat(left))
    end
  end
end
return table.concat(refused)
