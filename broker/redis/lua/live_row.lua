-- Of a message for many devices: what a node needs.
-- KEYS: <tag>:row. Answer: nothing, or the row; the bitmap of those it is settled for, as far as that is folded; the entries
-- after it.
-- reads only
local row = redis.call('GET', KEYS[1])
if not row then return false end
local tag = string.sub(KEYS[1], 1, -4)
local answer = redis.call('LRANGE', tag .. 'log', 0, -1)
local head, settled = redis.call('GETRANGE', tag .. 'sum', 0, 7), ''
if head ~= '' then
  local _, length = struct.unpack('>I4I4', head)
  settled = redis.call('GETRANGE', tag .. 'sum', 8, 7 + length)
end
table.insert(answer, 1, settled)
table.insert(answer, 1, row)
return answer
