-- Record changes, made along with something else in the app's slot. To be included: `-- include records` on a line
-- of its own puts this text there. Python's side is broker/redis/records.py:
--
--     while True:
--         packed = await records.prepare(changes)     # b"" for none; ValueError if they are of several apps
--         answer = await engine.call(script, [of_app(app_id, "log")], [..., packed, ...])
--         if not refused(answer): break               # raises Conflict, TooMany; True: prepare and call again
--
-- and in the script, with `tag` = "{7}":
--
--     local changes = read_changes(ARGV[n])
--     local refusal = check_changes(tag, changes)     -- before anything is written
--     if refusal then return refusal end              -- {"refused", kind, text}
--     local versions = make_changes(tag, changes, ids, repeated)
--
-- `ids`: of the messages, in order, as decimal text; the first stands in for the key of a change with key "" and
-- message 0. `repeated`: by position from 1, true where a message's cid was used before; nil for none. What may not be
-- made then is left out here, and has version -1 in the answer.
--
-- Keys: <tag>:rec:<kind>   hash, key -> version u32, due f64 (infinity: none), value
--       <tag>:recs:<kind>  sorted set of its keys, all scores 0
--       <tag>:due:<kind>   sorted set of the keys that have a due time
--       <tag>:kinds        set of the kinds there ever were
--       <tag>:fence        hash, kind -> the last touch of the list of due apps that a reader closed (records.py)
--       <tag>:deleted      there if the app was deleted

local function read_changes(packed)
  if packed == '' then return { {}, {} } end
  return cmsgpack.unpack(packed)
end

local function version_of(tag, change)
  local found = redis.call('HGET', tag .. ':rec:' .. change[1], change[2])
  return found and (struct.unpack('>I4', found)) or 0
end

local function check_changes(tag, changes)
  if redis.call('EXISTS', tag .. ':deleted') == 1 then return { 'refused', 'deleted', tag } end
  for kind, touch in pairs(changes[1]) do
    if touch <= tonumber(redis.call('HGET', tag .. ':fence', kind) or 0) then
      return { 'refused', 'late', kind }
    end
  end
  local more = {}
  for _, change in ipairs(changes[2]) do
    local kind, key, at_most = change[1], change[2], change[7]
    if key ~= '' and version_of(tag, change) ~= change[4] then
      return { 'refused', 'conflict', kind .. ' ' .. key .. ' was changed by somebody else' }
    end
    if at_most then
      more[kind] = (more[kind] or 0) + 1
      if redis.call('ZCARD', tag .. ':recs:' .. kind) + more[kind] > at_most then
        return { 'refused', 'too many', string.format('%.0f of kind %s', at_most, kind) }
      end
    end
  end
  return nil
end

local function make_change(tag, change, key)
  local kind, value, version, due = change[1], change[3], change[4] + 1, change[5]
  if not value then
    redis.call('HDEL', tag .. ':rec:' .. kind, key)
    redis.call('ZREM', tag .. ':recs:' .. kind, key)
    redis.call('ZREM', tag .. ':due:' .. kind, key)
    return 0
  end
  redis.call('HSET', tag .. ':rec:' .. kind, key, struct.pack('>I4d', version, due or math.huge) .. value)
  redis.call('ZADD', tag .. ':recs:' .. kind, 0, key)
  redis.call('SADD', tag .. ':kinds', kind)
  if due then
    redis.call('ZADD', tag .. ':due:' .. kind, string.format('%.17g', due), key)
  else
    redis.call('ZREM', tag .. ':due:' .. kind, key)
  end
  return version
end

local function make_changes(tag, changes, ids, repeated)
  repeated = repeated or {}
  local versions = {}
  for i, change in ipairs(changes[2]) do
    local message = change[6] + 1
    local left_out = repeated[message]
    if change[2] ~= '' then left_out = next(repeated) ~= nil end
    if left_out then
      versions[i] = -1
    elseif change[2] ~= '' then
      versions[i] = make_change(tag, change, change[2])
    else
      versions[i] = make_change(tag, change, ids[message])
    end
  end
  return versions
end
