-- Records what became of one message.
-- KEYS: <tag>:row. ARGV: "1" if callbacks were noted; entries (broker/redis/fates.py).
-- Answer: nothing if there is no such message; -1 and nothing is recorded if its callbacks are to be noted first; else
-- the length of its list and of its sum, both 0 for a message for one device.
-- repeatable
-- include rows
local ENTRY = 21
local key = KEYS[1]
local head = redis.call('GETRANGE', key, 0, HEAD - 1)
if head == '' then return false end
local flags, meta, tail, devno = struct.unpack('>BI4I2I4', head)
if has(flags, CALLBACK) and ARGV[1] ~= '1' then return { -1 } end

if not has(flags, SINGLE) then
  local tag = string.sub(key, 1, -4)
  local count = redis.call('RPUSH', tag .. 'log', unpack(ARGV, 2))
  if count == #ARGV - 1 then redis.call('PEXPIRE', tag .. 'log', math.max(1, redis.call('PTTL', key))) end
  return { count, redis.call('STRLEN', tag .. 'sum') }
end

local row = redis.call('GET', key)
local known, order, changed = {}, {}, false
for at = HEAD + meta + 1, HEAD + meta + tail, ENTRY do
  local kind = string.sub(row, at, at)
  known[kind] = string.sub(row, at, at + ENTRY - 1)
  order[#order + 1] = kind
end

local function concerns(entry)
  if #entry == ENTRY + 1 then return true end -- of the message as a whole
  if string.byte(entry, ENTRY + 1) ~= 0 then return false end
  for at = ENTRY + 2, #entry, 4 do
    if struct.unpack('>I4', entry, at) == devno then return true end
  end
  return false
end

for i = 2, #ARGV do
  local entry = ARGV[i]
  local kind = string.sub(entry, 1, 1)
  local late = known['d'] and (kind == 's' or kind == 'e' or kind == 'r') -- delivered wins
  if not known[kind] and not late and concerns(entry) then
    known[kind] = string.sub(entry, 1, ENTRY)
    order[#order + 1] = kind
    changed = true
    if kind == 'd' and known['s'] then -- when it was sent goes with it
      known[kind] = string.sub(entry, 1, 9) .. string.sub(known['s'], 2, 9) .. string.sub(entry, 18, ENTRY)
      known['s'] = nil
    end
  end
end
if changed then
  local entries = {}
  for _, kind in ipairs(order) do
    if known[kind] then
      entries[#entries + 1] = known[kind]
      known[kind] = nil
    end
  end
  local done = false
  for _, entry in ipairs(entries) do
    local kind = string.sub(entry, 1, 1)
    done = done or kind == 'd' or kind == 'e' or kind == 'r'
  end
  local live = string.sub(row, HEAD + meta + tail + 1)
  if done and has(flags, LIVE) then
    flags, live = flags - LIVE, ''
  end
  local body = string.sub(row, HEAD + 1, HEAD + meta)
  entries = table.concat(entries)
  head = struct.pack('>BI4I2I4', flags, meta, #entries, devno)
  redis.call('SET', key, head .. body .. entries .. live, 'KEEPTTL')
end
return { 0, 0 }
