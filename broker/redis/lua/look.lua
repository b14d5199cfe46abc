-- Everything that is kept of one message.
-- KEYS: <tag>:row. Answer: nothing, or its row; its sum ("" if none) and the entries after it, unless it is for one device.
-- reads only
-- include rows
local row = redis.call('GET', KEYS[1])
if not row then return false end
if has(string.byte(row), SINGLE) then return { row, '' } end
local tag = string.sub(KEYS[1], 1, -4)
local answer = redis.call('LRANGE', tag .. 'log', 0, -1)
table.insert(answer, 1, redis.call('GET', tag .. 'sum') or '')
table.insert(answer, 1, row)
return answer
