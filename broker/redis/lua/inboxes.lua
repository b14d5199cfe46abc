-- To be included. An inbox is one field, the device's place among 64, of <prefix>in:<n>: 12 bytes a message, oldest
-- first: msg_id u64, when it expires u32. Expects the local `prefix`.

local function inbox(offset)
  return prefix .. "in:" .. math.floor(offset / 64), offset % 64
end

local function keep(key, field, value)
  if value == "" then
    redis.call("HDEL", key, field)
  else
    redis.call("HSET", key, field, value)
  end
end

local function without_expired(value, now)
  local left = {}
  for at = 1, #value, 12 do
    if struct.unpack(">I4", value, at + 8) > now then
      left[#left + 1] = string.sub(value, at, at + 11)
    end
  end
  return table.concat(left)
end

-- The newest-N rule: what stays, and what goes as msg_id u64, offset u16.
local function newest(value, limit, offset)
  local surplus, gone = #value - 12 * limit, {}
  for at = 1, surplus, 12 do
    gone[#gone + 1] = string.sub(value, at, at + 7) .. struct.pack(">I2", offset)
  end
  return string.sub(value, math.max(surplus, 0) + 1), table.concat(gone)
end

local function note_evicted(at, gone)
  if #gone > 0 then
    redis.call("RPUSH", prefix .. "evicted", at .. table.concat(gone))
  end
end
