-- The broadcasts of an app that were accepted and are not over.
-- KEYS: <tag>:live (sorted set by their ends); beside it :log (see commit.lua). ARGV: now.
-- Answer: 1 if some of them are still in the log, else 0; their ids.
-- reads only
local tag = string.sub(KEYS[1], 1, -5)
local front = redis.call('LINDEX', tag .. 'log', 0)
local first = front and tonumber(string.match(front, '^%d+')) or math.huge
local answer = { 0 }
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. ARGV[1], '+inf')) do
  if tonumber(id) >= first then answer[1] = 1 end
  answer[#answer + 1] = id
end
return answer
