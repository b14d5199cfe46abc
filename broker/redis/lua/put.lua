-- Puts messages into inboxes of one partition, each once: what is not above the greatest id that was ever put here
-- is ignored, so a spreader that slept and goes on does nothing.
-- KEYS[1]: {a.p}:top (that id). ARGV: the newest-N limit; now, in whole seconds; the time as the evicted list has it
-- (8 bytes); for each device, ascending: offset u16, u8 1 if the newest-N rule applies, count u16, then by message: msg_id
-- u64, when it expires u32 (0: it is not kept, only its route is asked for).
-- Answer: offset u16, node u32 of those that have a route; likewise those that have a route and too much in their inbox;
-- then the list of what was evicted here and is not recorded yet: time (8 bytes), then msg_id u64, offset u16 each.
-- repeatable
local prefix = string.sub(KEYS[1], 1, -4)
-- include inboxes
local limit, now, time, devices = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local last = tonumber(redis.call("GET", KEYS[1]) or 0)
local greatest = last
local all_routes = #devices > 2000 and (redis.call("GET", prefix .. "routes") or "")
local routed, over, gone = {}, {}, {}

local function node_of(offset)
  local first = offset * 12
  return all_routes and string.sub(all_routes, first + 1, first + 4)
    or redis.call("GETRANGE", prefix .. "routes", first, first + 3)
end

local at = 1
while at <= #devices do
  local name = string.sub(devices, at, at + 1)
  local offset, rule, count = struct.unpack(">I2BI2", devices, at)
  local fresh, kept = {}, 0
  at = at + 5
  for entry = at, at + 12 * count - 12, 12 do
    if string.sub(devices, entry + 8, entry + 11) ~= "\0\0\0\0" then
      kept = kept + 1
      local id = struct.unpack(">I8", devices, entry)
      if id > last then
        fresh[#fresh + 1] = string.sub(devices, entry, entry + 11)
        if id > greatest then
          greatest = id
        end
      end
    end
  end
  at = at + 12 * count
  local node = node_of(offset)
  local has_route = #node == 4 and node ~= "\0\0\0\0"
  if has_route then
    routed[#routed + 1] = name .. node
  end
  if kept > 0 then
    local key, field = inbox(offset)
    local old = redis.call("HGET", key, field) or ""
    local value = old .. table.concat(fresh)
    if rule == 1 and #value > 12 * limit then
      value = without_expired(value, now)
      if #value <= 12 * limit then
        -- it was only that
      elseif has_route then
        over[#over + 1] = name .. node
      else
        local evicted
        value, evicted = newest(value, limit, offset)
        gone[#gone + 1] = evicted
      end
    end
    if value ~= old then
      keep(key, field, value)
    end
  end
end
if greatest ~= last then
  redis.call("SET", KEYS[1], string.format("%.0f", greatest))
end
note_evicted(time, gone)
return {table.concat(routed), table.concat(over), redis.call("LRANGE", prefix .. "evicted", 0, -1)}
