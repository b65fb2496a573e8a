/* XXH64 (seed 0) of every 64 KiB block of many leaves in one call, several blocks side by side; of memory as it is, or
 * while a socket fills it.
 *
 * No Python in here: host_library.py loads this as a plain shared library, so the interpreter is free meanwhile. The
 * algorithm is written out from its public specification. A block may consist of any number of pieces of memory (a leaf
 * of many small tensors). Blocks are independent of each other, and one block alone is a chain of dependent
 * multiplications; so a few "lanes" each hash a block of their own, all lanes by as many stripes at a time as each of
 * them has in one piece, and a lane whose block is finished takes the next one.
 *
 * Nothing outside of the segments is read: tables are checked as a whole before the first byte is.
 */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the digest is defined over little-endian words, and is read as such here"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PUBLIC __attribute__((visibility("default")))

enum { VERSION = 2, BLOCK = 64 * 1024, STRIPE = 32, LANES = 8 };
enum { PORTABLE = 0, AVX512 = 1, WAYS = 2 };

static const uint64_t P1 = 0x9E3779B185EBCA87u, P2 = 0xC2B2AE3D27D4EB4Fu, P3 = 0x165667B19E3779F9u,
                      P4 = 0x85EBCA77C2B2AE63u, P5 = 0x27D4EB2F165667C5u;

/* Memory, and which leaf begins in which segment, after how many bytes of it. */
struct tables {
    const int64_t *address, *size;
    int64_t segments;
    const int64_t *first, *skip, *nbytes;
    int64_t leaves;
};

/* A place in the segments. */
struct place {
    int64_t segment, skip;
};

struct lane {
    const uint8_t *at; /* the next stripe */
    int64_t stripes;   /* that lie there in one piece */
    struct place rest; /* what follows them */
    int64_t left;      /* bytes of the block from there on */
    int64_t nbytes;    /* of the block */
    uint64_t *out;
};

/* What no lane has begun. */
struct queue {
    int64_t leaf; /* the next one */
    struct place at;
    int64_t left; /* bytes of the leaf that is begun */
    uint64_t *out;
};

typedef uint64_t accumulators[4];

static uint64_t rotl(uint64_t value, int by) { return value << by | value >> (64 - by); }

static uint64_t word(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t mixed(uint64_t accumulator, uint64_t input) { return rotl(accumulator + input * P2, 31) * P1; }

/* --- stripes of one, four or eight blocks ---------------------------------------------------------------------- */

static void scalar(uint64_t *accumulator, const uint8_t *at, int64_t stripes) {
    uint64_t a = accumulator[0], b = accumulator[1], c = accumulator[2], d = accumulator[3];
    for (; stripes > 0; stripes--, at += STRIPE) {
        a = mixed(a, word(at));
        b = mixed(b, word(at + 8));
        c = mixed(c, word(at + 16));
        d = mixed(d, word(at + 24));
    }
    accumulator[0] = a, accumulator[1] = b, accumulator[2] = c, accumulator[3] = d;
}

#if defined(__x86_64__)
#define WIDE __attribute__((target("avx512f,avx512dq")))

/* A register holds the four accumulators of two blocks; `pairs` of them, a constant where this is inlined. */
WIDE static inline __attribute__((always_inline)) void wide(accumulators *accumulator, const uint8_t **at,
                                                            int64_t stripes, const int pairs) {
    const __m512i p1 = _mm512_set1_epi64((long long)P1), p2 = _mm512_set1_epi64((long long)P2);
    __m512i a[LANES / 2];
    const uint8_t *in[LANES];
    for (int pair = 0; pair < pairs; pair++) {
        a[pair] = _mm512_loadu_si512(accumulator[2 * pair]);
        in[2 * pair] = at[2 * pair], in[2 * pair + 1] = at[2 * pair + 1];
    }
    for (int64_t offset = 0; offset < stripes * STRIPE; offset += STRIPE) {
        for (int pair = 0; pair < pairs; pair++) {
            const __m256i low = _mm256_loadu_si256((const __m256i *)(const void *)(in[2 * pair] + offset));
            const __m256i high = _mm256_loadu_si256((const __m256i *)(const void *)(in[2 * pair + 1] + offset));
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            const __m512i sum = _mm512_add_epi64(a[pair], _mm512_mullo_epi64(both, p2));
            a[pair] = _mm512_mullo_epi64(_mm512_rol_epi64(sum, 31), p1);
        }
    }
    for (int pair = 0; pair < pairs; pair++) _mm512_storeu_si512(accumulator[2 * pair], a[pair]);
}

WIDE static void wide4(accumulators *accumulator, const uint8_t **at, int64_t stripes) {
    wide(accumulator, at, stripes, 2);
}

WIDE static void wide8(accumulators *accumulator, const uint8_t **at, int64_t stripes) {
    wide(accumulator, at, stripes, 4);
}

static int supported(void) { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"); }

static void several(accumulators *accumulator, const uint8_t **at, int lanes, int64_t stripes) {
    const int width = lanes > 4 ? 8 : 4;
    for (int lane = lanes; lane < width; lane++) at[lane] = at[0]; /* hashed, and forgotten */
    if (width == 8) wide8(accumulator, at, stripes);
    else wide4(accumulator, at, stripes);
}
#else
static int supported(void) { return 0; }

static void several(accumulators *accumulator, const uint8_t **at, int lanes, int64_t stripes) {
    for (int lane = 0; lane < lanes; lane++) scalar(accumulator[lane], at[lane], stripes);
}
#endif

/* --- the pieces of a block --------------------------------------------------------------------------------------- */

/* Bytes of the segment at `place` that are left; only where bytes are known to follow. */
static int64_t here(const struct tables *t, struct place *place) {
    while (place->skip == t->size[place->segment]) place->segment++, place->skip = 0;
    return t->size[place->segment] - place->skip;
}

/* `nbytes` further on. */
static struct place after(const struct tables *t, struct place place, int64_t nbytes) {
    while (nbytes > 0) {
        int64_t step = here(t, &place);
        if (step > nbytes) step = nbytes;
        place.skip += step, nbytes -= step;
    }
    return place;
}

static const uint8_t *pointer(const struct tables *t, const struct place *place) {
    return (const uint8_t *)(uintptr_t)t->address[place->segment] + place->skip;
}

/* The next `nbytes` of the lane's block, out of however many pieces. */
static void gather(const struct tables *t, struct lane *lane, uint8_t *to, int64_t nbytes) {
    lane->left -= nbytes;
    while (nbytes > 0) {
        int64_t step = here(t, &lane->rest);
        if (step > nbytes) step = nbytes;
        memcpy(to, pointer(t, &lane->rest), (size_t)step);
        lane->rest.skip += step, to += step, nbytes -= step;
    }
}

/* Find stripes that lie in one piece; 0 where the block has no whole stripe left. */
static int supply(const struct tables *t, struct lane *lane, uint64_t *accumulator) {
    while (lane->left >= STRIPE) {
        int64_t step = here(t, &lane->rest);
        if (step > lane->left) step = lane->left;
        if (step >= STRIPE) {
            lane->at = pointer(t, &lane->rest);
            lane->stripes = step / STRIPE;
            lane->rest.skip += lane->stripes * STRIPE, lane->left -= lane->stripes * STRIPE;
            return 1;
        }
        uint8_t stripe[STRIPE];
        gather(t, lane, stripe, STRIPE);
        scalar(accumulator, stripe, 1);
    }
    return 0;
}

static uint64_t finished(const struct tables *t, struct lane *lane, const uint64_t *accumulator) {
    uint64_t value = P5;
    if (lane->nbytes >= STRIPE) {
        value = rotl(accumulator[0], 1) + rotl(accumulator[1], 7) + rotl(accumulator[2], 12) + rotl(accumulator[3], 18);
        for (int i = 0; i < 4; i++) value = (value ^ mixed(0, accumulator[i])) * P1 + P4;
    }
    value += (uint64_t)lane->nbytes;
    uint8_t tail[STRIPE];
    int64_t count = lane->left, at = 0;
    gather(t, lane, tail, count);
    for (; at + 8 <= count; at += 8) value = rotl(value ^ mixed(0, word(tail + at)), 27) * P1 + P4;
    if (at + 4 <= count) {
        uint32_t half;
        memcpy(&half, tail + at, sizeof half);
        value = rotl(value ^ half * P1, 23) * P2 + P3;
        at += 4;
    }
    for (; at < count; at++) value = rotl(value ^ tail[at] * P5, 11) * P1;
    value = (value ^ value >> 33) * P2;
    value = (value ^ value >> 29) * P3;
    return value ^ value >> 32;
}

/* --- all blocks -------------------------------------------------------------------------------------------------- */

/* Give `lane` the next block; 0 where there is none. */
static int begin(const struct tables *t, struct queue *queue, struct lane *lane, uint64_t *accumulator) {
    while (queue->left == 0) {
        if (queue->leaf == t->leaves) return 0;
        queue->at = (struct place){t->first[queue->leaf], t->skip[queue->leaf]};
        queue->left = t->nbytes[queue->leaf++];
    }
    int64_t nbytes = queue->left < BLOCK ? queue->left : BLOCK;
    *lane = (struct lane){.rest = queue->at, .left = nbytes, .nbytes = nbytes, .out = queue->out++};
    accumulator[0] = P1 + P2, accumulator[1] = P2, accumulator[2] = 0, accumulator[3] = 0 - P1;
    queue->left -= nbytes;
    queue->at = after(t, queue->at, nbytes);
    return 1;
}

/* Go on until `lane` has stripes to hash; 0 where there is nothing more for it. */
static int prepare(const struct tables *t, struct queue *queue, struct lane *lane, uint64_t *accumulator) {
    while (lane->stripes == 0 && !supply(t, lane, accumulator)) {
        if (lane->out != NULL) *lane->out = finished(t, lane, accumulator);
        lane->out = NULL;
        if (!begin(t, queue, lane, accumulator)) return 0;
    }
    return 1;
}

static void hash(const struct tables *t, uint64_t *out, int lanes) {
    struct queue queue = {.out = out};
    struct lane lane[LANES] = {0};
    accumulators accumulator[LANES] = {0};
    const uint8_t *at[LANES];
    while (1) {
        int64_t stripes = INT64_MAX;
        for (int k = 0; k < lanes;) {
            if (!prepare(t, &queue, &lane[k], accumulator[k])) {
                lane[k] = lane[--lanes]; /* the last one takes its place */
                memcpy(accumulator[k], accumulator[lanes], sizeof(accumulators));
                continue;
            }
            at[k] = lane[k].at;
            if (lane[k].stripes < stripes) stripes = lane[k].stripes;
            k++;
        }
        if (lanes == 0) return;
        if (lanes == 1) scalar(accumulator[0], at[0], stripes);
        else several(accumulator, at, lanes, stripes);
        for (int k = 0; k < lanes; k++) lane[k].at += stripes * STRIPE, lane[k].stripes -= stripes;
    }
}

/* Blocks of all leaves; -1 where a leaf is not inside the segments. */
static int64_t counted(const struct tables *t) {
    int64_t blocks = 0;
    for (int64_t leaf = 0; leaf < t->leaves; leaf++) {
        int64_t left = t->nbytes[leaf], segment = t->first[leaf], skip = t->skip[leaf];
        if (left < 0 || left > INT64_MAX - BLOCK) return -1;
        if (left > 0 && (segment < 0 || segment >= t->segments || skip < 0 || skip > t->size[segment])) return -1;
        blocks += (left + BLOCK - 1) / BLOCK;
        for (; left > 0; segment++, skip = 0) {
            if (segment >= t->segments || t->size[segment] < 0) return -1;
            left -= t->size[segment] - skip < left ? t->size[segment] - skip : left;
        }
    }
    return blocks;
}

/* --- while a socket fills the memory ---------------------------------------------------------------------------- */

enum { GROUP = 3 * 512 * 1024, PIECES = 64 }; /* bytes that are hashed while they are in the cache; of memory in one call */
enum { COMPLETE = 0, LATER = -1, ENDED = -2, WRONG = -3 };

/* How far it is: bytes of all leaves that are in place and that are hashed, nanoseconds that hashing took. */
struct arrival {
    int64_t received, hashed, hashing_ns;
};

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Pieces of the memory of leaves, behind their first `have` bytes; how many. */
static size_t pieces(const struct tables *t, int64_t have, struct iovec *piece) {
    size_t count = 0;
    for (int64_t leaf = 0; leaf < t->leaves && count < PIECES; have -= t->nbytes[leaf++]) {
        int64_t left = t->nbytes[leaf] - (have > 0 ? have : 0);
        if (left <= 0) continue;
        struct place at = after(t, (struct place){t->first[leaf], t->skip[leaf]}, t->nbytes[leaf] - left);
        for (; left > 0 && count < PIECES; count++) {
            int64_t step = here(t, &at);
            if (step > left) step = left;
            piece[count] = (struct iovec){(void *)(uintptr_t)pointer(t, &at), (size_t)step};
            at.skip += step, left -= step;
        }
    }
    return count;
}

/* Receive and hash some leaves, of `nbytes` together, `begin` bytes after the first of all. */
static int arrived(int socket, int64_t until, int lanes, const struct tables *t, int64_t nbytes, int64_t begin,
                   uint64_t *out, struct arrival *arrival) {
    while (arrival->received < begin + nbytes) {
        if (now_ns() > until) return LATER; /* each call may come back with a byte */
        struct iovec piece[PIECES];
        struct msghdr message = {.msg_iov = piece, .msg_iovlen = pieces(t, arrival->received - begin, piece)};
        const ssize_t came = recvmsg(socket, &message, MSG_WAITALL);
        if (came == 0) return ENDED;
        if (came < 0) return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? LATER : errno;
        arrival->received += came;
    }
    const int64_t began = now_ns();
    hash(t, out, lanes);
    arrival->hashing_ns += now_ns() - began;
    arrival->hashed = begin + nbytes;
    return COMPLETE;
}

/* --- what host_library.py calls ---------------------------------------------------------------------------------- */

PUBLIC int weightwire_host_digest_version(void) { return VERSION; }

/* The fastest way on this processor. */
PUBLIC int weightwire_host_digest_way(void) { return supported() ? AVX512 : PORTABLE; }

/* The hashes of all blocks, leaf after leaf, into `out`; their number, or -1 (nothing read) where tables are wrong. */
PUBLIC int64_t weightwire_host_digest(int way, const int64_t *address, const int64_t *size, int64_t segments,
                                      const int64_t *first, const int64_t *skip, const int64_t *nbytes, int64_t leaves,
                                      uint64_t *out, int64_t room) {
    const struct tables t = {address, size, segments, first, skip, nbytes, leaves};
    if (way < 0 || way >= WAYS || (way == AVX512 && !supported()) || segments < 0 || leaves < 0) return -1;
    const int64_t blocks = counted(&t);
    if (blocks < 0 || blocks != room) return -1;
    hash(&t, out, way == AVX512 ? LANES : 1);
    return blocks;
}

/* The same while the bytes of the leaves come, in their order, from a blocking socket that has a time-out: a few
 * leaves are hashed as soon as they are in place, and most of them in the cache. `arrival` says how far it is, between
 * calls, too.
 *
 * COMPLETE; LATER: nothing came within the socket's time-out, or `most_ns` are over; ENDED: there will be no more;
 * WRONG: the tables are (nothing was touched); an errno: the socket broke. */
PUBLIC int weightwire_host_arrival(int socket, int64_t most_ns, int way, const int64_t *address, const int64_t *size,
                                   int64_t segments, const int64_t *first, const int64_t *skip, const int64_t *nbytes,
                                   int64_t leaves, uint64_t *out, int64_t room, struct arrival *arrival) {
    const struct tables t = {address, size, segments, first, skip, nbytes, leaves};
    if (way < 0 || way >= WAYS || (way == AVX512 && !supported()) || segments < 0 || leaves < 0) return WRONG;
    if (counted(&t) != room || arrival->received < arrival->hashed || arrival->hashed < 0) return WRONG;
    const int64_t until = now_ns() + most_ns;
    for (int64_t leaf = 0, end = 0, begin = 0; leaf < leaves; leaf = end) {
        int64_t group = 0, blocks = 0;
        for (; end < leaves && (end == leaf || group + nbytes[end] <= GROUP); end++)
            group += nbytes[end], blocks += (nbytes[end] + BLOCK - 1) / BLOCK;
        if (arrival->hashed < begin + group) {
            const struct tables some = {address, size, segments, first + leaf, skip + leaf, nbytes + leaf, end - leaf};
            const int lanes = way == AVX512 ? LANES : 1;
            const int failed = arrived(socket, until, lanes, &some, group, begin, out, arrival);
            if (failed) return failed;
        }
        out += blocks, begin += group;
    }
    return COMPLETE;
}
