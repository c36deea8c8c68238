#include "msgpack.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* OLDEST and VERSION are wire.py's, by setup.py. */

/* ---- Writing ---------------------------------------------------------------------------------------------------- */

static unsigned char *more(struct writer *w, size_t size) {
    if (size > w->room - w->size) {
        size_t room = w->room ? w->room : 4096;
        while (size > room - w->size) {
            if (room > SIZE_MAX / 2) abort();
            room *= 2;
        }
        unsigned char *data = realloc(w->data, room);
        if (!data) {
            static const char said[] = "pocket: no memory for a message\n";
            if (write(2, said, sizeof said - 1) < 0) _exit(125);
            _exit(125);
        }
        w->data = data;
        w->room = room;
    }
    unsigned char *at = w->data + w->size;
    w->size += size;
    return at;
}

/* A type byte and a number of `width` bytes, big-endian. */
static void put(struct writer *w, unsigned type, uint64_t number, size_t width) {
    unsigned char *at = more(w, 1 + width);
    *at = (unsigned char)type;
    for (size_t i = 0; i < width; i++) at[1 + i] = (unsigned char)(number >> 8 * (width - 1 - i));
}

static void put_body(struct writer *w, const void *data, size_t size) {
    if (size) memcpy(more(w, size), data, size);
}

void put_map(struct writer *w, uint32_t pairs) { put(w, 0xdf, pairs, 4); }

void put_array(struct writer *w, uint32_t items) { put(w, 0xdd, items, 4); }

void put_nil(struct writer *w) { put(w, 0xc0, 0, 0); }

void put_bool(struct writer *w, bool value) { put(w, value ? 0xc3 : 0xc2, 0, 0); }

void put_int(struct writer *w, int64_t number) { put(w, 0xd3, (uint64_t)number, 8); }

void put_real(struct writer *w, double number) {
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    put(w, 0xcb, bits, 8);
}

void put_text(struct writer *w, const char *text) {
    size_t size = strlen(text);
    if (size < 256)
        put(w, 0xd9, size, 1);
    else
        put(w, 0xdb, size, 4);
    put_body(w, text, size);
}

void put_bytes(struct writer *w, const void *data, size_t size) {
    put(w, 0xc6, size, 4);
    put_body(w, data, size);
}

void put_packed(struct writer *w, const struct writer *other) { put_body(w, other->data, other->size); }

/* ---- Reading ---------------------------------------------------------------------------------------------------- */

enum kind { NIL, BOOL, INT, REAL, TEXT, BYTES, ARRAY, MAP, EXTENSION, INVALID };

/* A value's first bytes: what it is, how long they are, how many bytes or values follow, or the number itself. */
struct head {
    enum kind kind;
    size_t size;
    uint64_t count;
};

static uint64_t number(const unsigned char *at, size_t width) {
    uint64_t found = 0;
    for (size_t i = 0; i < width; i++) found = found << 8 | at[i];
    return found;
}

static struct head head(struct part p) {
    /* From 0xc0 on: the kind, and the width of the number that stands behind the type byte. */
    static const struct {
        unsigned char kind, width;
    } types[32] = {
        {NIL, 0},     {INVALID, 0}, {BOOL, 0},      {BOOL, 0},      {BYTES, 1},     {BYTES, 2},   {BYTES, 4},
        {EXTENSION, 1}, {EXTENSION, 2}, {EXTENSION, 4}, {REAL, 4},  {REAL, 8},      {INT, 1},     {INT, 2},
        {INT, 4},     {INT, 8},     {INT, 1},       {INT, 2},       {INT, 4},       {INT, 8},     {INVALID, 0},
        {INVALID, 0}, {INVALID, 0}, {INVALID, 0},   {INVALID, 0},   {TEXT, 1},      {TEXT, 2},    {TEXT, 4},
        {ARRAY, 2},   {ARRAY, 4},   {MAP, 2},       {MAP, 4},
    };
    struct head h = {INVALID, 0, 0};
    if (!p.size) return h;
    unsigned type = *p.at;
    h.size = 1;
    if (type < 0x80 || type >= 0xe0) {
        h.kind = INT;
        h.count = (uint64_t)(int64_t)(int8_t)type;
    } else if (type < 0xc0) {
        h.kind = type < 0x90 ? MAP : type < 0xa0 ? ARRAY : TEXT;
        h.count = type & (type < 0xa0 ? 15 : 31);
    } else {
        size_t width = types[type - 0xc0].width;
        if (width > p.size - 1) return h;
        h.kind = types[type - 0xc0].kind;
        h.size += width;
        h.count = number(p.at + 1, width);
        if (type >= 0xd0 && type <= 0xd2 && h.count >> (8 * width - 1)) h.count |= UINT64_MAX << 8 * width;
        if (type == 0xc3) h.count = 1;
        if (type == 0xcf && h.count > INT64_MAX) h.kind = REAL; /* a number, and none that anything here means */
        if (h.kind == REAL) h.count = 0;
        if (h.kind == EXTENSION && (h.count || p.size == h.size)) h.kind = INVALID; /* wire.py takes empty ones alone */
        if (h.kind == EXTENSION) h.size++;
    }
    return h;
}

/* Split the value at the beginning of `rest` off. Its parts are counted, so nesting of any depth needs no stack. */
static bool split(struct part *rest, struct part *value) {
    struct part p = *rest;
    uint64_t left = 1;
    while (left) {
        struct head h = head(p);
        if (h.kind == INVALID) return false;
        left--;
        p.at += h.size;
        p.size -= h.size;
        if (h.kind == TEXT || h.kind == BYTES) {
            if (h.count > p.size) return false;
            p.at += h.count;
            p.size -= h.count;
        } else if (h.kind == ARRAY || h.kind == MAP) {
            left += h.kind == MAP ? 2 * h.count : h.count;
            if (left > p.size) return false; /* each has a byte at least */
        }
    }
    value->at = rest->at;
    value->size = (size_t)(p.at - rest->at);
    *rest = p;
    return true;
}

bool next(struct part *inside, struct part *value) { return split(inside, value); }

bool as_text(struct part value, struct part *text) {
    struct head h = head(value);
    if (h.kind != TEXT || h.count != value.size - h.size) return false;
    text->at = value.at + h.size;
    text->size = h.count;
    return true;
}

bool as_int(struct part value, int64_t *found) {
    struct head h = head(value);
    if (h.kind == INT) *found = (int64_t)h.count;
    return h.kind == INT;
}

bool as_map(struct part value, uint32_t *pairs, struct part *inside) {
    struct head h = head(value);
    if (h.kind != MAP) return false;
    *pairs = (uint32_t)h.count;
    inside->at = value.at + h.size;
    inside->size = value.size - h.size;
    return true;
}

bool is_nil(struct part value) { return head(value).kind == NIL; }

bool is_text(struct part value, const char *text) {
    struct part found;
    return as_text(value, &found) && found.size == strlen(text) && !memcmp(found.at, text, found.size);
}

bool get(struct part map, const char *key, struct part *value) {
    uint32_t pairs;
    struct part inside, name, found;
    bool there = false;
    if (!as_map(map, &pairs, &inside)) return false;
    while (pairs-- && next(&inside, &name) && next(&inside, &found))
        if (is_text(name, key)) {
            *value = found; /* of two the last, as Python's reader has it */
            there = true;
        }
    return there;
}

bool check(struct part body, const char **why) {
    struct part rest = body, whole, key, value, text;
    uint32_t pairs;
    int64_t version;
    *why = "not msgpack";
    if (!split(&rest, &whole) || rest.size) return false;
    *why = "not a map with string keys";
    if (!as_map(whole, &pairs, &rest)) return false;
    while (pairs--)
        if (!next(&rest, &key) || !next(&rest, &value) || !as_text(key, &text)) return false;
    *why = "no version of the protocol that is spoken here";
    return get(whole, "v", &value) && as_int(value, &version) && version >= OLDEST && version <= VERSION;
}
