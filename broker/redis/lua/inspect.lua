-- KEYS[1]: {a.p}:routes. ARGV: 6 bytes each, ascending: offset u16, epoch u32, as a node believes; its number, 0: any.
-- Answer: the offsets (u16) whose route is another; those that have something in the inbox.
-- reads only
local asked, mine = ARGV[1], tonumber(ARGV[2])
local prefix = string.sub(KEYS[1], 1, -7)
local routes = redis.call("GET", KEYS[1]) or ""
local lost, owing = {}, {}
local group, fields = -1, {}
for at = 1, #asked, 6 do
  local offset, epoch = struct.unpack(">I2I4", asked, at)
  local name = string.sub(asked, at, at + 1)
  local node, newest = 0, 0
  if #routes >= offset * 12 + 12 then
    node, newest = struct.unpack(">I4I4", routes, offset * 12 + 1)
  end
  if node == 0 or newest ~= epoch or (mine ~= 0 and node ~= mine) then
    lost[#lost + 1] = name
  end
  if math.floor(offset / 64) ~= group then
    group, fields = math.floor(offset / 64), {}
    for _, field in ipairs(redis.call("HKEYS", prefix .. "in:" .. group)) do
      fields[tonumber(field)] = true
    end
  end
  if fields[offset % 64] then
    owing[#owing + 1] = name
  end
end
return {table.concat(lost), table.concat(owing)}
