#!lua name=govledger
--[[ The server-side half of the ledger: all that must be atomic on a tenant's keys.

VERSION grows with every change to this file (a test pins its digest); a client replaces an older
library and never a newer one. OLDEST_CLIENT is the oldest protocol that this file still answers.

Refusals of a whole call are error replies: a code of ours, then facts divided by spaces.
Commit and publish never take the stream as a key, so a projector needs no right to write it. ]]

local VERSION = 3
local OLDEST_CLIENT = 3
local CLOCK_SKEW_LIMIT_MS = 300000
-- 15 digits are exact in a Lua number; a larger time half can only be foreign.
local MAX_TIME_DIGITS = 15
local FOREIGN_PAGE = 1000
local FOREIGN_PAGES_PER_CALL = 5

-- `redis.call` does not exist yet while the library loads.
local function call(...)
  return redis.call(...)
end

local function refuse(code, ...)
  return redis.error_reply(code .. ' ' .. table.concat({...}, ' '))
end

local function protocol_refusal(protocol)
  local wanted = tonumber(protocol)
  if not wanted or wanted > VERSION then
    return refuse('LEDGERLIBOLD', VERSION)
  end
  if wanted < OLDEST_CLIENT then
    return refuse('LEDGERLIBNEW', VERSION, OLDEST_CLIENT)
  end
end

local function server_now_ms()
  local t = call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function split_id(id)
  local time, seq = string.match(id, '^(%d+)-(%d+)$')
  return time, seq
end

local function id_is_greater(a, b)
  local a_time, a_seq = split_id(a)
  local b_time, b_seq = split_id(b)
  if #a_time ~= #b_time then return #a_time > #b_time end
  if a_time ~= b_time then return a_time > b_time end
  if #a_seq ~= #b_seq then return #a_seq > #b_seq end
  return a_seq > b_seq
end

local function read_head(key)
  local h = call('HMGET', key, 'epoch', 'id', 'seq', 'added', 'length', 'own', 'incidents')
  if not h[1] then return nil end
  local head = {epoch = h[1], id = h[2], seq = tonumber(h[3]), added = tonumber(h[4]),
                length = tonumber(h[5]), own = tonumber(h[6]), incidents = tonumber(h[7])}
  local whole = head.id and split_id(head.id) and head.seq and head.added and head.length
    and head.own and head.incidents
  return whole and head or nil
end

local function write_tail(key, head)
  call('HSET', key, 'id', head.id, 'seq', head.seq, 'added', head.added, 'length', head.length,
       'own', head.own)
end

local function write_head(key, head)
  call('HSET', key, 'epoch', head.epoch, 'incidents', head.incidents)
  write_tail(key, head)
end

local function read_tail(stream)
  local info = redis.pcall('XINFO', 'STREAM', stream)
  if info.err then
    if call('EXISTS', stream) == 1 then return call('XINFO', 'STREAM', stream) end  -- raises
    return {id = '0-0', added = 0, length = 0}
  end
  -- The order that every server has; half of the time goes into looking for names.
  if info[1] == 'length' and info[7] == 'last-generated-id' and info[11] == 'entries-added' then
    return {length = info[2], id = info[8], added = info[12]}
  end
  local tail = {}
  for i = 1, #info, 2 do
    if info[i] == 'length' then tail.length = info[i + 1]
    elseif info[i] == 'last-generated-id' then tail.id = info[i + 1]
    elseif info[i] == 'entries-added' then tail.added = info[i + 1] end
  end
  return tail
end

local function note_incident(head_key, head, now, incident)
  head.incidents = head.incidents + 1
  incident.noticed_ms = now
  local text = cjson.encode(incident)
  call('HSET', head_key, 'incident:' .. head.incidents, text)
  return text
end

-- Foreign entries lie behind the last id the function knows; each consumes an ordinal.
local function register_foreign(stream, head_key, head, now, notes)
  local from, count, first, last = head.id, 0, nil, nil
  for _ = 1, FOREIGN_PAGES_PER_CALL do
    local page = call('XRANGE', stream, '(' .. from, '+', 'COUNT', FOREIGN_PAGE)
    if #page == 0 then break end
    first = first or page[1][1]
    last = page[#page][1]
    from = last
    count = count + #page
    if #page < FOREIGN_PAGE then break end
  end
  if count > 0 then
    notes[#notes + 1] = note_incident(head_key, head, now, {kind = 'foreign', seq = head.seq + 1,
      count = count, first_id = first, last_id = last})
    head.seq = head.seq + count
    head.id = last
    head.length = head.length + count
    head.added = head.added + count
  end
end

-- A last id that is far ahead of the clock would make every later recorded time a lie.
local function blocked(tail, head, now)
  if not id_is_greater(tail.id, head.id) then return false end
  local time = split_id(tail.id)
  if #time > MAX_TIME_DIGITS then return true end
  return tonumber(time) > math.max(now, tonumber((split_id(head.id)))) + CLOCK_SKEW_LIMIT_MS
end

-- Index value: 6 bytes ms, 6 bytes seq (big-endian), 32 bytes SHA-256 of data.
local INDEX_VALUE_BYTES = 44

local function index_value(ms, seq, sha256)
  return struct.pack('>I6I6', ms, seq) .. sha256
end

-- Whether what lies up to the known tail is still ours: then a counter that went back was set by
-- XSETID, and the stream was not deleted and made again. In doubt it is: a reader checks ordinals.
local function still_ours(keys, head)
  local first = call('XRANGE', keys[1], '-', head.id, 'COUNT', 1)[1]
  if not first then return false end
  if #call('XRANGE', keys[1], head.id, head.id) > 0 then return true end
  if call('HLEN', keys[3]) ~= head.own then return true end
  local value = #first[2] == 6 and call('HGET', keys[3], first[2][4])
  if not value or #value ~= INDEX_VALUE_BYTES then return false end
  local ms, seq = split_id(first[1])
  return string.sub(value, 1, 12) == index_value(tonumber(ms), tonumber(seq), '')
end

-- Compares the stream with what the function last left there, and registers what others did.
local function reconcile(keys, head, now)
  local stream, head_key = keys[1], keys[2]
  local tail = read_tail(stream)
  if tail.id == head.id and tail.added == head.added and tail.length == head.length then
    return {}
  end
  if blocked(tail, head, now) then
    local limit = string.format('%.0f', now + CLOCK_SKEW_LIMIT_MS)
    local last = call('XREVRANGE', stream, limit, '(' .. head.id, 'COUNT', 1)[1]
    return nil, refuse('LEDGERBLOCKED', tail.id, head.id, last and last[1] or head.id)
  end
  local notes = {}
  local recreated = tail.added < head.added and not still_ours(keys, head)
  if recreated then
    notes[1] = note_incident(head_key, head, now, {kind = 'recreated', seq = head.seq,
      count = head.length, first_id = tail.id, last_id = head.id})
    -- Nothing says what lies at or below the old tail: count from what is there now.
    head.added, head.length = tail.added, tail.length
    if id_is_greater(tail.id, head.id) then head.length = 0 end
  end
  register_foreign(stream, head_key, head, now, notes)
  if #call('XRANGE', stream, '(' .. head.id, '+', 'COUNT', 1) > 0 then
    write_head(head_key, head)
    return nil, refuse('LEDGERFOREIGN', head.seq, head.id)
  end
  if tail.length < head.length then
    notes[#notes + 1] = note_incident(head_key, head, now, {kind = 'missing', seq = head.seq,
      count = head.length - tail.length, first_id = tail.id, last_id = head.id})
  elseif not recreated and (id_is_greater(tail.id, head.id) or tail.added ~= head.added) then
    notes[#notes + 1] = note_incident(head_key, head, now, {kind = 'moved', seq = head.seq,
      count = 0, first_id = head.id, last_id = tail.id})
  end
  head.length, head.added = tail.length, tail.added
  if id_is_greater(tail.id, head.id) then head.id = tail.id end
  write_head(head_key, head)
  return notes
end

-- The id's time half never goes back; its seq half is the ordinal, so a foreign id in the same
-- millisecond with a larger seq half pushes the time on by one.
local function next_time_ms(head, now)
  local time, seq = split_id(head.id)
  time = tonumber(time)
  if now > time then return now end
  if tonumber(seq) > head.seq then return time + 1 end
  return time
end

-- Groups in ARGV, each: 'expected seq (-1: any), latest `at` in ms, count' and, where it has one, its
-- name and that of the named group right behind which it may come alone; the names of its types
-- divided by spaces, which of them each event has (a byte an event, 'A' the first; empty where
-- there is one), then per event id, data, SHA-256 of data. Few arguments: each costs as much as a
-- table access does.
local EVENT_ARGS = 3
local FIRST_GROUP = 3
local FIRST_TYPE = 65  -- 'A'

local function read_groups(args)
  local groups, ids, count, at, last = {}, {}, 0, FIRST_GROUP, #args
  while at <= last do
    local expected, latest_at, events, name, behind =
      string.match(args[at], '^(-?%d+) (%d+) (%d+) ?(%w*) ?(%w*)$')
    local group = {expected = tonumber(expected), latest_at = tonumber(latest_at), first = at + 3,
                   name = name, behind = behind,
                   last = at + 3 + (tonumber(events) - 1) * EVENT_ARGS,
                   types = args[at + 1], codes = args[at + 2]}
    for event = group.first, group.last, EVENT_ARGS do
      count = count + 1
      ids[count] = args[event]
    end
    groups[#groups + 1] = group
    at = group.last + EVENT_ARGS
  end
  return groups, ids
end

-- Plans one group against what is known: its new events, its duplicates, or the refusal.
local function plan(group, args, known, head, ms)
  local new, count, duplicates, seq, pack = {}, 0, {}, head.seq, struct.pack
  for event = group.first, group.last, EVENT_ARGS do
    local id, sha256 = args[event], args[event + 2]
    local value = known[id]
    if not value then
      seq, count = seq + 1, count + 1
      known[id] = pack('>I6I6', ms, seq) .. sha256
      new[count] = event
    else
      local old_ms, old_seq = struct.unpack('>I6I6', value)
      local offset = (event - group.first) / EVENT_ARGS
      if string.sub(value, 13) ~= sha256 then
        return new, {1, offset, old_ms, old_seq, string.sub(value, 13)}
      end
      local at = #duplicates
      duplicates[at + 1], duplicates[at + 2], duplicates[at + 3] = offset, old_ms, old_seq
    end
  end
  if count > 0 and group.expected >= 0 and group.expected ~= head.seq then
    return new, {2, head.seq}
  end
  if count > 0 and group.latest_at > ms + CLOCK_SKEW_LIMIT_MS then
    return new, {3, ms}
  end
  return new, nil, duplicates
end

local function type_names(group)
  local names = {}
  for name in string.gmatch(group.types, '%S+') do names[#names + 1] = name end
  return names
end

local function write_group(stream, group, new, args, known, head, ms, index_args)
  local xadd, byte, prefix = redis.call, string.byte, string.format('%.0f-', ms)
  local seq, at, one, names = head.seq, #index_args, group.types, nil
  if group.codes ~= '' then one, names = nil, type_names(group) end
  for i = 1, #new do
    local event = new[i]
    local id = args[event]
    local kind = one or names[byte(group.codes, (event - group.first) / EVENT_ARGS + 1) - FIRST_TYPE + 1]
    seq = seq + 1  -- as text it is exact up to 14 digits
    xadd('XADD', stream, prefix .. seq, 'type', kind, 'id', id, 'data', args[event + 1])
    index_args[at + 1], index_args[at + 2] = id, known[id]
    at = at + 2
  end
  head.seq = seq
end

-- For metrics alone: who has no right to count appends all the same.
local function count_refused(head_key, duplicates, conflicts)
  if duplicates > 0 then redis.pcall('HINCRBY', head_key, 'duplicates', duplicates) end
  if conflicts > 0 then redis.pcall('HINCRBY', head_key, 'conflicts', conflicts) end
end

local function append_groups(keys, args, head, ms)
  local groups, ids = read_groups(args)
  local found, known = call('HMGET', keys[3], unpack(ids)), {}
  for i = 1, #ids do
    local value = found[i]
    if value then
      if #value ~= INDEX_VALUE_BYTES then return refuse('LEDGERBADINDEX', ids[i]) end
      known[ids[i]] = value
    end
  end
  local results, index_args, before, repeated, conflicts = {}, {}, head.seq, 0, 0
  local latest, named  -- the last named group that was accepted; the same, if it was here
  for g, group in ipairs(groups) do
    local first_seq = head.seq + 1
    local new, refusal, duplicates = {}, {4}, nil
    if group.behind ~= '' and not latest then latest = call('HGET', keys[2], 'batch') end
    if group.behind == '' or group.behind == latest then
      new, refusal, duplicates = plan(group, args, known, head, ms)
    end
    if refusal then
      for _, event in ipairs(new) do known[args[event]] = nil end
      results[g] = refusal
      if refusal[1] == 1 then conflicts = conflicts + 1 end
    else
      write_group(keys[1], group, new, args, known, head, ms, index_args)
      if group.name ~= '' then latest, named = group.name, group.name end
      results[g] = {0, ms, first_seq, duplicates}
      repeated = repeated + #duplicates / 3
    end
  end
  if #index_args > 0 then
    call('HSET', keys[3], unpack(index_args))
    local written = head.seq - before
    head.id = string.format('%.0f-%.0f', ms, head.seq)
    head.added, head.length = head.added + written, head.length + written
    head.own = head.own + written
    if head.new then write_head(keys[2], head) else write_tail(keys[2], head) end
  end
  if named then call('HSET', keys[2], 'batch', named) end
  if head.seq > 0 then count_refused(keys[2], repeated, conflicts) end
  return results, #index_args > 0
end

-- KEYS: stream, head, index. ARGV: protocol, 'client's ms, flags, epoch for a new tenant', groups.
-- Flags: `r` the tenant's name is in the registry; `w` make an effective write in any case.
local function append(keys, args)
  local now = server_now_ms()
  local client_ms, flags, epoch = string.match(args[2], '^(%d+) (%a*) (%x+)$')
  if math.abs(now - tonumber(client_ms)) > CLOCK_SKEW_LIMIT_MS then
    return refuse('LEDGERSKEW', string.format('%.0f', now))
  end
  local head = read_head(keys[2])
  if not head then
    if call('EXISTS', keys[1], keys[3]) > 0 then return refuse('LEDGERNOHEAD') end
    if not string.find(flags, 'r', 1, true) then return refuse('LEDGERUNREGISTERED') end
    head = {epoch = epoch, id = '0-0', seq = 0, added = 0, length = 0, own = 0, incidents = 0,
            new = true}
  end
  local notes, notes_refusal = reconcile(keys, head, now)
  if not notes then return notes_refusal end
  local indexed = call('HLEN', keys[3])
  if indexed ~= head.own then return refuse('LEDGERBEHIND', indexed, head.own) end
  -- Nothing undoes an XADD whose index entry is then denied.
  if not redis.acl_check_cmd('HSET', keys[3], '', '') then
    return refuse('NOPERM', 'an append needs the right to run HSET')
  end
  local results, wrote = append_groups(keys, args, head, next_time_ms(head, now))
  if results.err then return results end
  if not wrote and string.find(flags, 'w', 1, true) then
    call('HINCRBY', keys[2], 'touched', 1)
  end
  return {head.epoch, notes, results}
end

-- Registers what others did to the stream, without an append. KEYS: stream, head, index.
-- ARGV: protocol.
local function notice(keys, args)
  local head = read_head(keys[2])
  if not head then return refuse('LEDGERNOHEAD') end
  local notes, notes_refusal = reconcile(keys, head, server_now_ms())
  return notes or notes_refusal
end

-- A head made anew from what a reader took the stream to be; see `finish_reindex`.
local FIRST_RUN = 8
local function rebuilt_head(key, args, tail)
  local head = {epoch = args[2], id = tail.id, seq = tonumber(args[4]), incidents = 0}
  local now = server_now_ms()
  call('DEL', key)  -- it may be there and damaged
  note_incident(key, head, now, {kind = 'headless', seq = head.seq, count = tonumber(args[5]),
    first_id = '0-0', last_id = tail.id})
  for run = FIRST_RUN, #args, 4 do
    note_incident(key, head, now, {kind = 'foreign', seq = tonumber(args[run]),
      count = tonumber(args[run + 1]), first_id = args[run + 2], last_id = args[run + 3]})
  end
  return head
end

-- Puts a rebuilt index in place if it covers the stream to the tail that the caller read.
-- KEYS: stream, head, index, rebuilt index. ARGV: protocol, epoch for a lost head, the tail read:
-- last id, ordinal, own entries, entries added, length; then, for a lost head, the runs of foreign
-- entries: first ordinal, count, first id, last id.
local function finish_reindex(keys, args)
  local tail, head = read_tail(keys[1]), read_head(keys[2])
  if tail.id ~= args[3] or tail.added ~= tonumber(args[6]) or tail.length ~= tonumber(args[7]) then
    return refuse('LEDGERMOVED', tail.id)
  end
  local own, rebuilt = tonumber(args[5]), call('HLEN', keys[4])
  if own ~= rebuilt then return refuse('LEDGERBEHIND', rebuilt, own) end
  if not head then
    head = rebuilt_head(keys[2], args, tail)
  elseif head.added ~= tail.added or head.length ~= tail.length then
    return refuse('LEDGERMOVED', head.id)
  end
  head.own, head.added, head.length = own, tail.added, tail.length
  call('DEL', keys[3])
  if own > 0 then call('RENAME', keys[4], keys[3]) end
  write_head(keys[2], head)
  return own
end

-- Where a projection stands and which build of it that is: a rebuild starts a new build, so that a
-- projector which still holds the old entities cannot commit them on top.
local function committed_at(key)
  local at = call('HMGET', key, 'position', 'build')
  if not at[1] then return '' end
  return at[1] .. ' ' .. (at[2] or '')
end

-- Who folds is written in the lease, a string that expires. Its holder's own name is the fencing
-- token: as long as another one stands there, nothing is committed.
local function other_holder(key, worker, lease_ms)
  local holder = call('GET', key)
  if not holder or holder == worker then return nil end
  local left_ms = call('PTTL', key)
  -- What never expires, or later than any lease, is none.
  if left_ms >= 0 and left_ms <= tonumber(lease_ms) then return holder, left_ms end
end

local function take_lease(key, worker, lease_ms)
  local holder, left_ms = other_holder(key, worker, lease_ms)
  if holder then return holder, left_ms end
  call('SET', key, worker, 'PX', lease_ms)
end

-- KEYS: leases of one tenant. ARGV: protocol, worker, lease in ms. Answers for each key the holder and
-- how long it still holds, in ms; an empty name where it is the worker now.
local function lease(keys, args)
  local answers = {}
  for i, key in ipairs(keys) do
    local holder, left_ms = take_lease(key, args[2], args[3])
    answers[i] = {holder or '', left_ms or 0}
  end
  return answers
end

-- Takes a lease from whoever holds it: its commits are refused from here on. KEYS: the lease. ARGV:
-- protocol, who takes it, for how long in ms.
local function seize(keys, args)
  call('SET', keys[1], args[2], 'PX', args[3])
  return 1
end

-- KEYS: leases of one tenant. ARGV: protocol, worker: gives back what it holds of them.
local function release(keys, args)
  local released = 0
  for _, key in ipairs(keys) do
    if call('GET', key) == args[2] then released = released + call('DEL', key) end
  end
  return released
end

-- A snapshot has `state` as it was, and under `e:<name>` what another entity was before its first change
-- since (empty: it was not there), until the next snapshot is made. So an entity at a snapshot is the
-- first value found there, in the later ones, in the bucket. `build` says that nothing was lost of it.
local FIRST_TRIPLE = 9
local ENTITIES_A_CALL = 1000  -- `unpack` fails at 8,000

local function keep_previous(keys, args, latest, first, last)
  local fields, new = {}, {}
  for i = first, last, 3 do fields[#fields + 1] = 'e:' .. args[i + 1] end
  local kept = call('HMGET', keys[latest], unpack(fields))
  for n, field in ipairs(fields) do
    if not kept[n] then
      local i = first + 3 * (n - 1)
      local before = call('HGET', keys[tonumber(args[i])], args[i + 1])
      new[#new + 1], new[#new + 2] = field, before or ''
    end
  end
  if #new > 0 then call('HSET', keys[latest], unpack(new)) end
end

local function keep_all_previous(keys, args, latest, entities)
  if latest == 0 or call('HGET', keys[latest], 'build') ~= args[4] then return end
  local last = FIRST_TRIPLE + 3 * (entities - 1)
  for first = FIRST_TRIPLE, last, 3 * ENTITIES_A_CALL do
    keep_previous(keys, args, latest, first, math.min(last, first + 3 * (ENTITIES_A_CALL - 1)))
  end
end

-- KEYS: a projection's hash, its lease, then its buckets, the quarantine and snapshots. ARGV: protocol,
-- position and build folded from ('' = none), position folded to, build, worker, lease in ms, snapshots,
-- state for a new one, then triples: number of the key in KEYS, field, value. Snapshots: number of the
-- latest one's key, how many of the triples come first and change entities, numbers of the new one's
-- key and of the list's, its seq; each 0 where there is none.
local function commit(keys, args)
  local committed = committed_at(keys[1])
  if committed ~= args[2] then return refuse('LEDGERPOSITION', committed) end
  local holder, left_ms = take_lease(keys[2], args[5], args[6])
  if holder then return refuse('LEDGERLEASE', left_ms, holder) end
  local latest, entities, new, list, seq = string.match(args[7], '^(%d+) (%d+) (%d+) (%d+) (%d+)$')
  keep_all_previous(keys, args, tonumber(latest), tonumber(entities))
  call('HSET', keys[1], 'position', args[3], 'build', args[4])
  call('HDEL', keys[1], 'stopped')  -- whoever marked it, it goes on
  for i = FIRST_TRIPLE, #args, 3 do
    call('HSET', keys[tonumber(args[i])], args[i + 1], args[i + 2])
  end
  if new ~= '0' then
    call('DEL', keys[tonumber(new)])
    call('HSET', keys[tonumber(new)], 'state', args[8], 'position', args[3], 'build', args[4])
    call('HSET', keys[tonumber(list)], seq, args[3] .. ' ' .. args[4])
  end
  return 1
end

-- Drops a snapshot that is not the latest. What it has of entities goes to the one before it, a part at
-- each call; it ceases to be a place to begin from at the first. KEYS: projection's hash, lease, list of
-- snapshots, the one to drop, the one before it where there is one. ARGV: protocol, position and build
-- that the list was read with, worker, lease in ms, seq, cursor ('0' at first), how many fields to move.
-- Answers the next call's cursor, or an empty one where nothing is left.
local function drop_snapshot(keys, args)
  local committed = committed_at(keys[1])
  if committed ~= args[2] then return refuse('LEDGERPOSITION', committed) end
  local holder, left_ms = take_lease(keys[2], args[3], args[4])
  if holder then return refuse('LEDGERLEASE', left_ms, holder) end
  if keys[5] then
    call('HSET', keys[3], args[5], 'merging')
    call('HDEL', keys[4], 'state')
    local cursor, page = unpack(call('HSCAN', keys[4], args[6], 'MATCH', 'e:*', 'COUNT', args[7]))
    for i = 1, #page, 2 do
      call('HSETNX', keys[5], page[i], page[i + 1])
      call('HDEL', keys[4], page[i])
    end
    if cursor ~= '0' or call('HLEN', keys[4]) > 2 then return cursor end  -- position and build stay
  end
  call('HDEL', keys[3], args[5])
  call('UNLINK', keys[4])
  return ''
end

-- A version's entries of the quarantine list, which all projections share, are replaced.
local function adopt_quarantined(list, rebuilt, prefix)
  for _, field in ipairs(call('HKEYS', list)) do
    if string.sub(field, 1, #prefix) == prefix then call('HDEL', list, field) end
  end
  local found = call('HGETALL', rebuilt)
  for i = 1, #found, 2 do call('HSET', list, found[i], found[i + 1]) end
  call('UNLINK', rebuilt)
end

local function epoch_and_seq(committed)
  local epoch, seq = string.match(committed, '^(%x+)/(%d+)/')
  return epoch, tonumber(seq)
end

-- Puts a rebuilt projection in the place of the old one, unless that is of the same epoch and further on:
-- readers would go back. KEYS: pairs of old and rebuilt key, the projection's hashes first, the quarantine
-- lists last, then the old one's lease. ARGV: protocol, position and build of the rebuilt one, what the
-- fields of its version begin with in the quarantine list, who may hold the lease ('' = nobody): nothing
-- was committed since it was taken, so what is further on is what the ledger has no more.
local function adopt(keys, args)
  if committed_at(keys[1]) == args[2] then return 1 end  -- our own call, whose answer was lost
  local rebuilt = committed_at(keys[2])
  if rebuilt ~= args[2] then return refuse('LEDGERPOSITION', rebuilt) end
  local live_epoch, live_seq = epoch_and_seq(committed_at(keys[1]))
  local epoch, seq = epoch_and_seq(rebuilt)
  if live_epoch and live_epoch == epoch and live_seq > seq and call('GET', keys[#keys]) ~= args[4] then
    return refuse('LEDGERAHEAD', live_seq)
  end
  adopt_quarantined(keys[#keys - 2], keys[#keys - 1], args[3])
  for i = 1, #keys - 3, 2 do
    if call('EXISTS', keys[i + 1]) == 1 then
      call('RENAME', keys[i + 1], keys[i])
    else
      call('UNLINK', keys[i])
    end
  end
  return 1
end

-- Everything after the value in an envelope that `publish` wrote; anchored, as a value can hold anything.
local ENVELOPE_TAIL = '("createdAt":"([^"]*)","updatedAt":"[^"]*","metadata":{"epoch":"(%x+)",'
  .. '"position":"[^"]*","seq":(%d+),"projection":"[^"{}]*","version":(%d+)[^{}]*}})$'
local ENVELOPE_TAIL_BYTES = 600
local PUBLISHED, NOBODY_TOLD = 1, 2

-- KEYS: the published key. ARGV: protocol, value, now as ISO 8601, epoch, seq, version, metadata, TTL in
-- s (0 = none), and the tail that was seen there ('' = none). What is older, of the same epoch and
-- version, is replaced; of the same seq it has its TTL renewed. Anything else of ours only while its tail
-- is the one that was seen: that is answered, for the caller to look whether it may be replaced.
local function publish(keys, args)
  local tail = redis.pcall('GETRANGE', keys[1], -ENVELOPE_TAIL_BYTES, -1)
  if type(tail) ~= 'string' then tail = '' end  -- another type of key: SET replaces it
  local there, created, epoch, seq, version = string.match(tail, ENVELOPE_TAIL)
  local ttl = tonumber(args[8])
  if there and there ~= args[9] then
    local same_fold = epoch == args[4] and version == args[6]
    local ahead = tonumber(seq) - tonumber(args[5])
    if not same_fold or ahead > 0 then return there end
    if ahead == 0 then
      if ttl > 0 then call('EXPIRE', keys[1], ttl) else call('PERSIST', keys[1]) end
      return there
    end
  end
  local envelope = '{"value":' .. args[2] .. ',"createdAt":"' .. (created or args[3])
    .. '","updatedAt":"' .. args[3] .. '","metadata":' .. args[7] .. '}'
  if ttl > 0 then
    call('SET', keys[1], envelope, 'EX', ttl)
  else
    call('SET', keys[1], envelope)
  end
  -- Readers listen to the channel of the key's name; their own checks find what they were not told.
  local told = redis.pcall('PUBLISH', keys[1], args[4] .. '/' .. args[5])
  if type(told) == 'table' then return NOBODY_TOLD end
  return PUBLISHED
end

-- A ledger that went back is another one from here on. KEYS: stream, head. ARGV: protocol, the epoch that
-- it has ('' = no head), the new one.
local function begin_epoch(keys, args)
  local head = read_head(keys[2])
  if not head then return refuse('LEDGERNOHEAD') end
  if head.epoch == args[3] then return 1 end  -- our own call, whose answer was lost
  if head.epoch ~= args[2] then return refuse('LEDGERMOVED', head.epoch) end
  note_incident(keys[2], head, server_now_ms(), {kind = 'epoch', seq = head.seq, count = head.length,
    first_id = '0-0', last_id = head.id})
  head.epoch = args[3]
  write_head(keys[2], head)
  return 1
end

-- The memory service's envelope is the published one with any metadata.
local MEMORY_TAIL = '"createdAt":"([^"]*)","updatedAt":"[^"]*","metadata":{[^{}]*}}$'

-- When a memory key was first set: our own envelope's end says it, another client's is decoded.
local function created_at(key)
  local tail = call('GETRANGE', key, -ENVELOPE_TAIL_BYTES, -1)
  if tail == '' then return nil end
  local created = string.match(tail, MEMORY_TAIL)
  if not created then
    local whole, envelope = pcall(cjson.decode, call('GET', key))
    created = whole and type(envelope) == 'table' and envelope.createdAt
  end
  if type(created) ~= 'string' or #created > 40 then return nil end
  return string.match(created, '^[%w:.+-]+$')
end

-- KEYS: the memory key. ARGV: protocol, value, now as ISO 8601, metadata, TTL in s (0 = none).
local function memory_set(keys, args)
  local envelope = '{"value":' .. args[2] .. ',"createdAt":"' .. (created_at(keys[1]) or args[3])
    .. '","updatedAt":"' .. args[3] .. '","metadata":' .. args[4] .. '}'
  if tonumber(args[5]) > 0 then
    call('SET', keys[1], envelope, 'EX', args[5])
  else
    call('SET', keys[1], envelope)
  end
  return 1
end

-- A tenant's record that is imported grows beside the tenant's own keys, under a token, and takes
-- their place in one call. KEYS of these: stream, head, index, then the same three being imported.
-- ARGV begins with protocol and token. Who begins later takes over: the earlier token is refused.
local function import_refusal(keys, args)
  if call('EXISTS', keys[1], keys[2], keys[3]) > 0 then return refuse('LEDGEREXISTS') end
  if call('HGET', keys[5], 'token') ~= args[2] then return refuse('LEDGERIMPORT') end
end

local function import_begin(keys, args)
  if call('EXISTS', keys[1], keys[2], keys[3]) > 0 then return refuse('LEDGEREXISTS') end
  call('UNLINK', keys[4], keys[5], keys[6])
  call('HSET', keys[5], 'token', args[2])
  return 1
end

-- Then: number of the first incident, their JSON in order.
local function import_incidents(keys, args)
  local refusal = import_refusal(keys, args)
  if refusal then return refusal end
  for i = 4, #args do
    call('HSET', keys[5], 'incident:' .. (tonumber(args[3]) + i - 4), args[i])
  end
  return 1
end

-- Then: entries imported before, entries here, and for each its id, its value in the index ('' =
-- it is foreign), its number of fields and values, and these.
local function import_page(keys, args)
  local refusal = import_refusal(keys, args)
  if refusal then return refusal end
  local before, count, have = tonumber(args[3]), tonumber(args[4]), call('XLEN', keys[4])
  if have == before + count then return have end  -- our own call, whose answer was lost
  if have ~= before then return refuse('LEDGERIMPORT') end
  local at = 5
  while at <= #args do
    local last = at + 2 + tonumber(args[at + 2])
    call('XADD', keys[4], args[at], unpack(args, at + 3, last))
    if args[at + 1] ~= '' then call('HSET', keys[6], args[at + 6], args[at + 1]) end
    at = last + 1
  end
  return before + count
end

-- Then: epoch, last id, seq, entries, own entries, incidents.
local function import_finish(keys, args)
  local there = read_head(keys[2])
  if there and there.epoch == args[3] then return 1 end  -- our own call, whose answer was lost
  local refusal = import_refusal(keys, args)
  if refusal then return refusal end
  local length, own = tonumber(args[6]), tonumber(args[7])
  if call('XLEN', keys[4]) ~= length then return refuse('LEDGERIMPORT') end
  local indexed = call('HLEN', keys[6])
  if indexed ~= own then return refuse('LEDGERBEHIND', indexed, own) end
  if length == 0 then  -- the only way to a stream without an entry
    call('XGROUP', 'CREATE', keys[4], 'none', '$', 'MKSTREAM')
    call('XGROUP', 'DESTROY', keys[4], 'none')
  end
  call('XSETID', keys[4], args[4], 'ENTRIESADDED', length)
  call('HDEL', keys[5], 'token')
  write_head(keys[5], {epoch = args[3], id = args[4], seq = tonumber(args[5]), added = length,
                       length = length, own = own, incidents = tonumber(args[8])})
  call('RENAME', keys[4], keys[1])
  if own > 0 then call('RENAME', keys[6], keys[3]) end
  call('RENAME', keys[5], keys[2])
  return 1
end

local function import_discard(keys, args)
  if call('HGET', keys[5], 'token') ~= args[2] then return 0 end
  return call('UNLINK', keys[4], keys[5], keys[6])
end

-- A restored tenant is not the continuation of the one it was copied from. KEYS: head. ARGV:
-- protocol, epoch it has, epoch it gets.
local function new_epoch(keys, args)
  local epoch = call('HGET', keys[1], 'epoch')
  if epoch == args[3] then return 1 end  -- our own call, whose answer was lost
  if epoch ~= args[2] then return refuse('LEDGERMOVED', epoch or '') end
  call('HSET', keys[1], 'epoch', args[3])
  return 1
end

-- What is done to a projection beside its commits is refused as they are: where something else is
-- committed than the caller saw, or another worker folds it.
local function fence_refusal(keys, args, committed)
  if committed ~= args[2] then return refuse('LEDGERPOSITION', committed) end
  local holder, left_ms = other_holder(keys[2], args[3], args[4])
  if holder then return refuse('LEDGERLEASE', left_ms, holder) end
end

-- Deletes a fold. KEYS: a projection's hash, its lease, then all that belongs to the fold. ARGV:
-- protocol, position and build that were seen ('' = none), worker, lease in ms. Where nothing is
-- committed, what is there belongs to nothing.
local DISCARD_A_CALL = 1000  -- `unpack` fails at 8,000
local function discard(keys, args)
  local committed = committed_at(keys[1])
  local refusal = fence_refusal(keys, args, committed == '' and args[2] or committed)
  if refusal then return refusal end
  call('UNLINK', keys[1])
  for i = 3, #keys, DISCARD_A_CALL do
    call('UNLINK', unpack(keys, i, math.min(i + DISCARD_A_CALL - 1, #keys)))
  end
  return 1
end

-- Sets a mark beside what is committed. KEYS: a projection's hash, its lease. ARGV: protocol, position
-- and build that it is about, worker, lease in ms, the mark's name, its value ('' = none).
local function mark(keys, args)
  local refusal = fence_refusal(keys, args, committed_at(keys[1]))
  if refusal then return refusal end
  if args[6] == '' then
    call('HDEL', keys[1], args[5])
  else
    call('HSET', keys[1], args[5], args[6])
  end
  return 1
end

-- Makes readers take a version, unless they take a later one, or one that a command has pinned. KEYS:
-- which versions are active. ARGV: protocol, the projection's name, version.
local function activate(keys, args)
  local active = call('HMGET', keys[1], args[2], args[2] .. ':pinned')
  local now = tonumber(active[1] or '')
  if active[2] or (now and now >= tonumber(args[3])) then return 0 end
  call('HSET', keys[1], args[2], args[3])
  return 1
end

-- A row of hashes only grows, so what begins with the row that comes is a later sealer's, and stays: two
-- sealers, and calls that are late or sent twice, leave the longest. KEYS: a log's tiles. ARGV:
-- protocol, then for each tile its field and its hashes. A key of another type gives way.
local function write_tiles(keys, args)
  local kind = call('TYPE', keys[1]).ok
  if kind ~= 'hash' and kind ~= 'none' then call('UNLINK', keys[1]) end
  for i = 2, #args, 2 do
    local there = call('HGET', keys[1], args[i])
    local is_tile = there and #there % 32 == 0 and #there <= 8192
    if not is_tile or string.sub(there, 1, #args[i + 1]) ~= args[i + 1] then
      call('HSET', keys[1], args[i], args[i + 1])
    end
  end
  return 1
end

-- Every function's first argument is the protocol that the client speaks.
local function register(name, run, flags)
  redis.register_function{function_name = name, flags = flags or {}, callback = function(keys, args)
    return protocol_refusal(args[1]) or run(keys, args)
  end}
end

register('govledger_append', append)
register('govledger_notice', notice)
register('govledger_finish_reindex', finish_reindex)
register('govledger_begin_epoch', begin_epoch)
register('govledger_lease', lease)
register('govledger_release', release)
register('govledger_seize', seize)
register('govledger_commit', commit)
register('govledger_drop_snapshot', drop_snapshot)
register('govledger_adopt', adopt)
register('govledger_publish', publish)
register('govledger_discard', discard)
register('govledger_mark', mark)
register('govledger_activate', activate)
register('govledger_memory_set', memory_set)
register('govledger_import_begin', import_begin)
register('govledger_import_incidents', import_incidents)
register('govledger_import_page', import_page)
register('govledger_import_finish', import_finish)
register('govledger_import_discard', import_discard, {'allow-oom'})
register('govledger_new_epoch', new_epoch)
register('govledger_write_tiles', write_tiles)
redis.register_function{function_name = 'govledger_version', flags = {'no-writes'},
  callback = function() return {VERSION, OLDEST_CLIENT} end}
