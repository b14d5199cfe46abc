-- How a message's row is laid out (broker/redis/rows.py); to be included.
--   flags u8, meta length u32, tail length u16, devno u32; meta, tail, live part
-- The tail has the entries of a message for one device; the live part is there while somebody may be owed the message.
local HEAD, SINGLE, LIVE, CALLBACK = 11, 1, 2, 4

local function has(flags, flag)
  return math.floor(flags / flag) % 2 == 1
end

-- Without the live part; its TTL stays.
local function cut_row(key)
  local head = redis.call('GETRANGE', key, 0, HEAD - 1)
  if head == '' then return end
  local flags, meta, tail, devno = struct.unpack('>BI4I2I4', head)
  if not has(flags, LIVE) then return end
  local rest = redis.call('GETRANGE', key, HEAD, HEAD + meta + tail - 1)
  redis.call('SET', key, struct.pack('>BI4I2I4', flags - LIVE, meta, tail, devno) .. rest, 'KEEPTTL')
end
