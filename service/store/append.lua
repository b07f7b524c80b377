-- Takes events: each once, a user's clicks into their past. The result is the same for any order, repetition and
-- grouping of calls. The layout of a past stands in codec.py.
-- KEYS  pasts and tag lists, in any order
-- ARGV  most clicks of a past, most bytes of one, seconds to keep it, seconds to keep a tag list; then four for each
--       event: the position of its tag list in KEYS, its tag, the position of its past or 0, its record or nothing.
--       One user's events stand together and in the order of a past.
-- Returns for each event 1 if it was new, 0 if it was known, 2 if its keys hold what this script cannot read: they are
-- left as they are.

local HEADER, FRONT, TAG = 9, 10, 6
local MAX_TAGS_BYTES = 65536 -- of a day and user; beyond it the older half is forgotten
local byte, sub, char, find, format = string.byte, string.sub, string.char, string.find, string.format
local max_clicks, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local past_ttl, tags_ttl = ARGV[3], ARGV[4]

local function u16(text, at)
  local a, b = byte(text, at, at + 1)
  return a * 256 + b
end

local function bytes_of(number, count)
  local bytes = {}
  for i = count, 1, -1 do
    bytes[i] = char(number % 256)
    number = math.floor(number / 256)
  end
  return table.concat(bytes)
end

local function size_of(text, at)
  local size = byte(text, at)
  if size == 255 then size = u16(text, at + 1) end
  if size <= FRONT then error('a record of ' .. size .. ' bytes') end
  return size
end

-- Where a record's content begins: its item's form, its time, its tag, its item.
local function content(text, at)
  return byte(text, at) < 255 and at + 1 or at + 3
end

local function time_of(text, at)
  local a, b, c, d, e, f = byte(text, at + 1, at + 6)
  return ((((a * 256 + b) * 256 + c) * 256 + d) * 256 + e) * 256 + f
end

local function item_of(text, at)
  local form, from = byte(text, at), at + FRONT
  if form <= 22 then return sub(text, from, from + form - 1), from + form end
  if form == 31 then
    local size = u16(text, from)
    return sub(text, from + 2, from + 1 + size), from + 2 + size
  end
  local number, stop = 0, from + form - 22
  for i = from, stop - 1 do number = number * 256 + byte(text, i) end
  return format('%.0f', number), stop
end

-- Lua's own < follows the server's locale; bytes do not.
local function compare_bytes(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = byte(a, i), byte(b, i)
    if x ~= y then return x - y end
  end
  return #a - #b
end

-- By time, item and tag: negative where the record at `i` of `a` comes before the one at `j` of `b`.
local function compare(a, i, b, j)
  i, j = content(a, i), content(b, j)
  local difference = time_of(a, i) - time_of(b, j)
  if difference ~= 0 then return difference end
  difference = compare_bytes(item_of(a, i), item_of(b, j))
  if difference ~= 0 then return difference end
  return compare_bytes(sub(a, i + 7, i + 9), sub(b, j + 7, j + 9))
end

-- The record without its features.
local function floor_of(text, at)
  local from = content(text, at)
  local _, stop = item_of(text, from)
  local front = sub(text, from, stop - 1)
  local size = #front + 1
  return size < 255 and char(size) .. front or char(255) .. bytes_of(size + 2, 2) .. front
end

-- Tag lists and pasts as they are read once, with what is added; false for one that cannot be read.
local tag_lists, pasts, touched = {}, {}, {}

local function tag_list(position)
  local list = tag_lists[position]
  if list == nil then
    local value = redis.pcall('GET', KEYS[position])
    if type(value) == 'table' then
      list = false
    else
      list = {known = value or '', added = {}}
    end
    tag_lists[position] = list
  end
  return list
end

local function is_known(list, tag)
  if list.added[tag] then return true end
  local from = 1
  while true do
    local at = find(list.known, tag, from, true)
    if not at then return false end
    if (at - 1) % TAG == 0 then return true end
    from = at + 1
  end
end

-- `parts` are the new past as far as it is merged, `rest` is where in `old` the unmerged records begin.
local function past_of(position)
  local past = pasts[position]
  if past == nil then
    local value = redis.pcall('GET', KEYS[position])
    if not value then
      past = {old = '', rest = 1, last = 0, count = 0, floor = '', parts = {}, events = {}}
    elseif type(value) == 'table' or #value < HEADER or byte(value, 1) ~= 2 then
      past = false
    else
      local floor_bytes = u16(value, 8)
      local a, b, c, d = byte(value, 4, 7)
      local begin = HEADER + floor_bytes
      past = {
        old = sub(value, begin + 1), rest = 1, last = ((a * 256 + b) * 256 + c) * 256 + d - begin + 1,
        count = u16(value, 2), floor = sub(value, HEADER + 1, begin), parts = {}, events = {},
      }
    end
    pasts[position] = past
    if past then touched[#touched + 1] = position end
  end
  return past
end

-- Merges a record that is later than those before it. Whether it is none of those that are there.
local function insert(past, record)
  if past.floor ~= '' and compare(record, 1, past.floor, 1) <= 0 then return true end
  local old, parts = past.old, past.parts
  if past.rest <= #old then
    if compare(record, 1, old, past.last) > 0 then
      parts[#parts + 1] = sub(old, past.rest)
      past.rest = #old + 1
    else
      local at = past.rest
      local difference = compare(old, at, record, 1)
      while difference < 0 do
        at = at + size_of(old, at)
        difference = compare(old, at, record, 1)
      end
      if at > past.rest then
        parts[#parts + 1] = sub(old, past.rest, at - 1)
        past.rest = at
      end
      if difference == 0 then return false end
    end
  end
  parts[#parts + 1] = record
  past.count, past.tail, past.is_changed = past.count + 1, record, true
  return true
end

-- The past's new value.
local function merged(past)
  local old, parts = past.old, past.parts
  local last_size
  if past.rest <= #old then
    parts[#parts + 1] = sub(old, past.rest)
    last_size = #old - past.last + 1
  else
    last_size = #past.tail
  end
  local records = table.concat(parts)
  local from, count = 1, past.count
  while count > max_clicks do
    from = from + size_of(records, from)
    count = count - 1
  end
  -- What is dropped for its bytes, and all before it, must not come in again where something smaller would fit.
  local dropped
  while #records - from + 1 > max_bytes do
    dropped = from
    from = from + size_of(records, from)
    count = count - 1
  end
  local floor = past.floor
  if dropped then
    floor = floor_of(records, dropped)
  elseif count == max_clicks then
    floor = ''
  end
  local last = count > 0 and HEADER + #floor + (#records - from + 1) - last_size or 0
  return char(2) .. bytes_of(count, 2) .. bytes_of(last, 4) .. bytes_of(#floor, 2) .. floor .. sub(records, from)
end

local results, added = {}, {}
local function refuse(past) -- what cannot be merged
  past.is_changed = false
  for _, event in ipairs(past.events) do results[event] = 2 end
end

for i = 5, #ARGV, 4 do
  local event = #results + 1
  local list, position = tag_list(tonumber(ARGV[i])), tonumber(ARGV[i + 2])
  local past = position > 0 and past_of(position)
  results[event] = 2
  if list and (position == 0 or past) then
    local tag = ARGV[i + 1]
    results[event] = 0
    if not is_known(list, tag) then
      list.added[tag] = true
      added[event] = {list, tag}
      results[event] = 1
      if past then
        past.events[#past.events + 1] = event
        local is_merged, is_new = pcall(insert, past, ARGV[i + 3])
        if not is_merged then
          refuse(past)
        elseif not is_new then
          results[event] = 0
        end
      end
    end
  end
end

for _, position in ipairs(touched) do
  local past = pasts[position]
  if past.is_changed then
    local is_merged, value = pcall(merged, past)
    if is_merged then redis.call('SET', KEYS[position], value, 'EX', past_ttl) else refuse(past) end
  end
end

local tags = {}
for event, result in ipairs(results) do
  if result ~= 2 and added[event] then
    local list, tag = added[event][1], added[event][2]
    tags[list] = (tags[list] or '') .. tag
  end
end
for position, list in pairs(tag_lists) do
  local more = list and tags[list]
  if more then
    local known = list.known
    if #known + #more > MAX_TAGS_BYTES then known = sub(known, math.floor(#known / TAG / 2) * TAG + 1) end
    -- Not APPEND: a server doubles what it appends to.
    redis.call('SET', KEYS[position], known .. more, 'EX', tags_ttl)
  end
end
return results
