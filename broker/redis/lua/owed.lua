-- KEYS[1]: {a.p}:top. ARGV: now, in whole seconds; seconds after which what expired is taken out; 12 bytes a request: offset u16,
-- after u64, limit u16. Answer: for each the msg_ids (u64) that wait, oldest first.
-- repeatable
-- volatile
-- volatile
local prefix = string.sub(KEYS[1], 1, -4)
-- include inboxes
local now, grace, requests, answers = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], {}
for at = 1, #requests, 12 do
  local offset, after, limit = struct.unpack(">I2I8I2", requests, at)
  local key, field = inbox(offset)
  local value, ids, over = redis.call("HGET", key, field) or "", {}, false
  for entry = 1, #value, 12 do
    local expires = struct.unpack(">I4", value, entry + 8)
    over = over or expires <= now - grace
    if #ids < limit and expires > now and struct.unpack(">I8", value, entry) > after then
      ids[#ids + 1] = string.sub(value, entry, entry + 7)
    end
  end
  if over then
    keep(key, field, without_expired(value, now - grace))
  end
  answers[#answers + 1] = table.concat(ids)
end
return answers
