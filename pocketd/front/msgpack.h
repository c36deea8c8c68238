/* msgpack (github.com/msgpack/msgpack/blob/master/spec.md), as much as the messages of pocketd/wire.py are made of.
 *
 * A reader is a part of a body that check() accepted; it copies nothing and reads nothing outside of that body. The
 * writer grows as it must; a process without memory for it ends, saying so.
 */
#ifndef POCKET_MSGPACK_H
#define POCKET_MSGPACK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct writer {
    unsigned char *data; /* the caller's to free */
    size_t size, room;
};

/* Bytes of a body: a text's, in whatever encoding, or a value's. */
struct part {
    const unsigned char *at;
    size_t size;
};

void put_map(struct writer *, uint32_t pairs);
void put_array(struct writer *, uint32_t items);
void put_nil(struct writer *);
void put_bool(struct writer *, bool);
void put_int(struct writer *, int64_t);
void put_real(struct writer *, double);
void put_text(struct writer *, const char *);
void put_bytes(struct writer *, const void *, size_t);
void put_packed(struct writer *, const struct writer *);

/* Is this a message: one whole map with texts as keys, of a version that is spoken? Where it is not, `why` says so. */
bool check(struct part body, const char **why);

/* The value of a key in a map that lies in a checked body; false where `map` is none, or has no such key. */
bool get(struct part map, const char *key, struct part *value);

/* A value as what it is; false where it is something else, or a number beyond int64_t. */
bool as_text(struct part value, struct part *text);
bool as_int(struct part value, int64_t *number);
bool as_map(struct part value, uint32_t *pairs, struct part *inside);
bool is_nil(struct part value);
bool is_text(struct part value, const char *text);

/* The next value inside a map or an array, whose key or item it is; `inside` goes on behind it. */
bool next(struct part *inside, struct part *value);

#endif
