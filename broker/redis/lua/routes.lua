-- Claims and releases of routes in one partition, in their order.
-- KEYS[1]: {a.p}:routes (12 bytes a device at its place: node u32, epoch u32, last seen u32); beside it :on (a bit for
-- each device with a route, the least significant first), :nodes (node -> devices), :formers, :calls (caller -> number of
-- its last call; for two minutes), :in:<n> (inboxes).
-- ARGV[1]: 11 bytes each: u8 0 release | 1 claim; u16 offset; u32 epoch (release)
-- or node; u32 last seen (release). ARGV[2]: the caller. ARGV[3]: number of the call, which grows with each of the caller's.
-- Answer: 9 bytes each: epoch u32, the node that had it before u32, u8 1 if something is in the inbox. Zeros for a release,
-- and for the claims of a call that comes after a later one: a copy that was under way when its connection broke must not
-- take a device back. A call that comes twice is answered as things are; of two claims of one device in it the first one has
-- the epoch before.
-- repeatable
local routes, ops = KEYS[1], ARGV[1]
local prefix = string.sub(routes, 1, -7)
local answers = {}
local number, last = tonumber(ARGV[3]), tonumber(redis.call("HGET", prefix .. "calls", ARGV[2]) or 0)
if number > last then
  redis.call("HSET", prefix .. "calls", ARGV[2], number)
  redis.call("PEXPIRE", prefix .. "calls", 120000)
end

local later = {} -- offset -> claims of it in a repeated call that are not answered yet
if number == last then
  for at = 1, #ops, 11 do
    local op, offset = struct.unpack(">BI2", ops, at)
    later[offset] = (later[offset] or 0) + op
  end
end

local function count(node, by)
  if node ~= 0 and redis.call("HINCRBY", prefix .. "nodes", node, by) == 0 then
    redis.call("HDEL", prefix .. "nodes", node)
  end
end

local function set(offset, node, epoch, seen)
  redis.call("SETRANGE", routes, offset * 12, struct.pack(">I4I4I4", node, epoch, seen))
  redis.call("SETBIT", prefix .. "on", offset - offset % 8 + 7 - offset % 8, node == 0 and 0 or 1)
end

for at = 1, #ops, 11 do
  local op, offset, first, second = struct.unpack(">BI2I4I4", ops, at)
  local old = redis.call("GETRANGE", routes, offset * 12, offset * 12 + 11)
  local node, epoch, seen = 0, 0, 0
  if #old == 12 then
    node, epoch, seen = struct.unpack(">I4I4I4", old)
  end
  if op == 0 then
    if node ~= 0 and epoch == first then
      count(node, -1)
      set(offset, 0, epoch, second)
    end
    answers[#answers + 1] = "\0\0\0\0\0\0\0\0\0"
  elseif number < last then
    answers[#answers + 1] = "\0\0\0\0\0\0\0\0\0"
  else
    local former = node
    if number == last then
      former = tonumber(redis.call("HGET", prefix .. "formers", offset) or 0)
      if node ~= first then -- it has moved on since
        former, epoch = 0, math.max(epoch - 1, 1)
      end
      later[offset] = later[offset] - 1
      epoch = math.max(epoch - later[offset], 1)
    elseif node ~= first then
      if node ~= 0 then
        redis.call("HSET", prefix .. "formers", offset, node)
        redis.call("PEXPIRE", prefix .. "formers", 60000)
      end
      count(node, -1)
      count(first, 1)
    else -- perhaps the first answer was lost
      former = tonumber(redis.call("HGET", prefix .. "formers", offset) or 0)
    end
    if number > last then
      epoch = epoch % 4294967295 + 1
      set(offset, first, epoch, seen)
    end
    local owes = redis.call("HEXISTS", prefix .. "in:" .. math.floor(offset / 64), offset % 64)
    answers[#answers + 1] = struct.pack(">I4I4B", epoch, former, owes)
  end
end
return table.concat(answers)
