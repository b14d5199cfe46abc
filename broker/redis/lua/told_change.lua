-- Changes callback events of one app.
-- KEYS: <tag>:told (hash: number, of 13 digits -> attempts u32, time f64, error length u16, error, event); beside it :told:due and :told:parked
-- (sorted sets of numbers, by time and by number), :told:seq (the last number), :told:fence (the last touch that a reader
-- closed).
-- ARGV: tag; touch of the list of apps, or "" if no event gets an earlier time; verb; then
--   add:      due, packed event, due, …
--   done:     numbers
--   failed:   due or "" (parked), error, numbers
--   postpone: due, numbers
--   retry:    how many parked ones at most, due
--   drop:     how many parked ones at most
-- Answer: "late", and nothing changed, if the touch was closed; else how many events changed.
local tag, touch, verb = ARGV[1], ARGV[2], ARGV[3]
local told, dues, parked = KEYS[1], KEYS[1] .. ':due', KEYS[1] .. ':parked'
if touch ~= '' and tonumber(touch) <= tonumber(redis.call('GET', KEYS[1] .. ':fence') or 0) then return 'late' end
if redis.call('EXISTS', tag .. ':deleted') == 1 then return 0 end
local changed = 0

local function set_due(number, due)
  if due == '' then
    redis.call('ZREM', dues, number)
    redis.call('ZADD', parked, number, number)
  else
    redis.call('ZREM', parked, number)
    redis.call('ZADD', dues, due, number)
  end
  changed = changed + 1
end

local function drop(number)
  redis.call('ZREM', dues, number)
  redis.call('ZREM', parked, number)
  changed = changed + redis.call('HDEL', told, number)
end

local function mark(number, packed, attempts, error)
  local _, at, length = struct.unpack('>I4dI2', packed)
  local rest = string.sub(packed, 15 + length)
  redis.call('HSET', told, number, struct.pack('>I4dI2', attempts, at, #error) .. error .. rest)
end

if verb == 'add' then
  local last = tonumber(redis.call('GET', KEYS[1] .. ':seq') or 0)
  for i = 4, #ARGV, 2 do
    last = math.max(last + 1, tonumber(touch)) -- touches grow over all apps
    local number = string.format('%013.0f', last)
    redis.call('HSET', told, number, ARGV[i + 1])
    set_due(number, ARGV[i])
  end
  redis.call('SET', KEYS[1] .. ':seq', string.format('%.0f', last))
elseif verb == 'done' then
  for i = 4, #ARGV do drop(ARGV[i]) end
elseif verb == 'failed' then
  for i = 6, #ARGV do
    local packed = redis.call('HGET', told, ARGV[i])
    if packed then
      mark(ARGV[i], packed, struct.unpack('>I4', packed) + 1, ARGV[5])
      set_due(ARGV[i], ARGV[4])
    end
  end
elseif verb == 'postpone' then
  for i = 5, #ARGV do
    if redis.call('HEXISTS', told, ARGV[i]) == 1 then set_due(ARGV[i], ARGV[4]) end
  end
else
  for _, number in ipairs(redis.call('ZRANGE', parked, 0, ARGV[4] - 1)) do
    if verb == 'drop' then
      drop(number)
    else
      local packed = redis.call('HGET', told, number)
      local _, _, length = struct.unpack('>I4dI2', packed)
      mark(number, packed, 0, string.sub(packed, 15, 14 + length))
      set_due(number, ARGV[5])
    end
  end
end
return changed
