-- KEYS[1]: <tag>:recs:<kind>, KEYS[2]: <tag>:rec:<kind>. ARGV: the key to start after, how many at most.
-- Answer: key, packed record, key, …
-- repeatable
local from = ARGV[1] == '' and '-' or '(' .. ARGV[1]
local keys = redis.call('ZRANGEBYLEX', KEYS[1], from, '+', 'LIMIT', 0, ARGV[2])
local answer = {}
for i, key in ipairs(keys) do
  answer[2 * i - 1] = key
  answer[2 * i] = redis.call('HGET', KEYS[2], key)
end
return answer
