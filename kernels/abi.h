// The structs that kernels and Rust share. Plain C: fixed-width integers, floats, nested structs.
//
// A pointer is KVLAR_ADDR(T): a T* in a kernel, a uint64_t for bindgen, so that the Rust side is
// plain data. Every entry point takes exactly one of these structs, by value. Strides of rows in
// pages are bytes; strides of dense activations (q, k, v, out) are elements. Padding is explicit.
#ifndef KVLAR_ABI_H
#define KVLAR_ABI_H
#include <stdint.h>

#if defined(__CUDACC__) || defined(KVLAR_SIMT)
#define KVLAR_ADDR(T) T *
#define KVLAR_CHECK_SIZE(type, bytes) static_assert(sizeof(type) == (bytes), #type " changed size")
#else
#define KVLAR_ADDR(T) uint64_t
#define KVLAR_CHECK_SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type " changed size")
#endif

#define KVLAR_ABI_VERSION 1
#define KVLAR_MAX_SEGMENTS 4
#define KVLAR_WORK_RECORD 27          // int32s a CTA of a work list (attend/work_list.cuh); one a unit has four less
#define KVLAR_LOWRANK_WORK_RECORD 20  // likewise, of attend_lowrank
#define KVLAR_SCORE_BINS 2048  // of a histogram of scores: the top 11 bits of their order, see device/order.cuh

// Bits of the status word: what a kernel had to clamp.
enum {
  KVLAR_STATUS_BAD_PAGE = 1,    // a page id outside [0, page_count)
  KVLAR_STATUS_BAD_LENGTH = 2,  // a length outside [0, max_rows]
  KVLAR_STATUS_BAD_SLOT = 4,    // a slot beyond max_rows (negative means: skip)
};

// What the bytes of a stored row mean.
enum {
  KVLAR_CODEC_BF16 = 0,
  KVLAR_CODEC_F16 = 1,
  KVLAR_CODEC_INT8 = 2,  // token-wise: u8 codes, then (f16 scale, f16 zero) a group in the page's params
  KVLAR_CODEC_INT4 = 3,  // likewise, two 4-bit codes a byte, the lower first
  KVLAR_CODEC_INT2 = 4,  // likewise, four 2-bit codes a byte
  KVLAR_CODEC_FP8 = 5,   // e4m3, times a scale a head
  // Channel-wise: codes as above, an (f16 scale, f16 zero) a channel and group of rows in the page's params; a page holds
  // whole groups.
  KVLAR_CODEC_INT4_CHANNEL = 6,
  KVLAR_CODEC_INT2_CHANNEL = 7,
  KVLAR_CODEC_PQ = 8,    // a byte a sub-vector: its centroid's number in the head's codebooks
};

// How a segment's latents are stored, and with what type they meet the basis.
enum {
  KVLAR_LATENT_NONE = 0,        // not a latent segment
  KVLAR_LATENT_DTYPE = 1,       // type of q, as is the basis
  KVLAR_LATENT_INT8 = 2,        // int8, a scale and zero a row; the basis is f16
  KVLAR_LATENT_INT8_BASIS = 3,  // likewise, and the basis is int8 with a scale a rotary pair
};

// What append_lowrank does with one side.
enum {
  KVLAR_SIDE_NONE = 0,     // nothing
  KVLAR_SIDE_PROJECT = 1,  // rows to latents
  KVLAR_SIDE_STORE = 2,    // rows as they come: ready-made latents, or dense rows of the kv heads
};

// How the query heads of a kv head share the score of a row.
enum {
  KVLAR_SCORE_MEAN_LOGIT = 0,
  KVLAR_SCORE_MAX_LOGIT = 1,
  KVLAR_SCORE_MAX_PROB = 2,  // the largest of logit - lse
};

// Which rows score_* ranks.
enum {
  KVLAR_COLUMNS_PREFIX = 0,  // those before the queries' own
  KVLAR_COLUMNS_ALL = 1,
  KVLAR_COLUMNS_CHUNK = 2,   // those of a chunk
};

// How the weights that queries give a row become one number; and those of the query heads of a kv head.
enum { KVLAR_REDUCE_SUM = 0, KVLAR_REDUCE_MEAN = 1, KVLAR_REDUCE_MAX = 2 };

// How a query head's scores are pooled along the rows.
enum { KVLAR_POOL_NONE = 0, KVLAR_POOL_AVG = 1, KVLAR_POOL_MAX = 2 };

// How layers share rows.
enum {
  KVLAR_BUDGET_DYNAMIC = 0,  // by where the best scores are (DynamicKV)
  KVLAR_BUDGET_PYRAMID = 1,  // evenly falling (PyramidKV)
  KVLAR_BUDGET_UNIFORM = 2,
};

// What score_keys judges a row by.
enum {
  KVLAR_KEYS_L2NORM = 0,
  KVLAR_KEYS_KEYDIFF = 1,
  KVLAR_KEYS_LAGKV = 2,
  KVLAR_KEYS_VALUE_KEY_RATIO = 3,
};

// Element types of activations.
enum { KVLAR_DTYPE_BF16 = 0, KVLAR_DTYPE_F16 = 1, KVLAR_DTYPE_F32 = 2 };

enum { KVLAR_ROPE_NONE = 0, KVLAR_ROPE_HALF = 1, KVLAR_ROPE_INTERLEAVED = 2 };

// Which rows a (sequence, cache group) holds: shared by keys, values, scales and scores.
typedef struct {
  KVLAR_ADDR(const int32_t) table;    // page ids [seq][head?][page]; null = page p of the sequence
  int64_t table_seq_stride;           // elements
  int64_t table_head_stride;          // 0 = one table for all heads
  KVLAR_ADDR(const int32_t) lengths;  // rows held, [seq][head?]
  int64_t length_seq_stride;
  int64_t length_head_stride;         // 0 = one length for all heads
  KVLAR_ADDR(int32_t) positions;      // position of each row, [seq?][head?][page][row in page]; null = row index
  int64_t position_seq_stride;        // 0 where page ids are global
  int64_t position_head_stride;
  uint32_t page_rows_log2;
  uint32_t max_rows;                  // capacity: lengths and slots are clamped to it
} KvlarRows;
KVLAR_CHECK_SIZE(KvlarRows, 80);

// Where the bytes of those rows are. Row r of page p of head h of sequence s starts at
// data + s * seq_stride + h * head_stride + p * page_stride + r * row_stride, 16-byte aligned.
typedef struct {
  KVLAR_ADDR(void) data;
  int64_t seq_stride;
  int64_t head_stride;
  int64_t page_stride;
  uint32_t row_stride;
  uint32_t params_offset;  // of the scales and zeros, from the page's (and head's) start
  uint32_t params_stride;  // bytes of scales and zeros a row, or, channel-wise, a group of rows
  uint32_t page_count;     // valid page ids (for a null table: pages a sequence)
} KvlarPool;
KVLAR_CHECK_SIZE(KvlarPool, 48);

typedef struct {
  KVLAR_ADDR(const float) inv_freq;  // [rotary_dim / 2]
  float attention_factor;            // multiplies cos and sin
  uint32_t rotary_dim;               // dims beyond it are left as they are
  uint32_t layout;                   // KVLAR_ROPE_*
  uint32_t reserved;
} KvlarRope;
KVLAR_CHECK_SIZE(KvlarRope, 24);

// How rows are encoded.
typedef struct {
  KVLAR_ADDR(const float) tables;  // fp8: scales [head], null = 1; pq: codebooks [head][dim / group][centroids][group]
  uint32_t codec;                  // KVLAR_CODEC_*
  uint32_t group;                  // values that share a scale and zero, or (pq) a code; channel-wise: rows
  uint32_t hadamard;               // 1: rows are rotated (device/hadamard.cuh) before they are encoded
  uint32_t centroids;              // pq: of a sub-vector, up to 256
} KvlarFormat;
KVLAR_CHECK_SIZE(KvlarFormat, 24);

// Rows of one storage format. The rows of a sequence are its segments' rows, one after the other.
typedef struct {
  KvlarRows rows;
  KvlarPool keys;
  KvlarPool values;
  KvlarFormat key_format;    // of keys, or their latents
  KvlarFormat value_format;
  uint32_t latent;           // KVLAR_LATENT_*: attend_lowrank only
  uint32_t tile_rows;        // rows that a warp takes at a time, from the kernel's tiling
  uint32_t stage_values;     // attend_quantized: bytes into a stage of the ring, as are the others
  uint32_t stage_key_params;
  uint32_t stage_value_params;
  uint32_t stage_positions;
} KvlarSegment;
KVLAR_CHECK_SIZE(KvlarSegment, 248);

// attend: out = softmax(scale * q k^T, masked) v, and its log-sum-exp.
typedef struct {
  KvlarSegment segments[KVLAR_MAX_SEGMENTS];
  KVLAR_ADDR(const void) q;  // [seqs][kv_heads * group][query_rows][head_dim], rotated
  int64_t q_seq_stride;
  int64_t q_head_stride;
  int64_t q_row_stride;
  KVLAR_ADDR(void) out;      // [seqs][kv_heads * group][query_rows][value_dim]
  int64_t out_seq_stride;
  int64_t out_head_stride;
  int64_t out_row_stride;
  KVLAR_ADDR(float) lse;                  // [seqs][kv_heads * group][query_rows]; may be null
  KVLAR_ADDR(const int32_t) q_positions;  // [seqs][query_rows]; null = the last query_rows rows'
  KVLAR_ADDR(const float) sink_logits;    // [kv_heads * group]; may be null
  KVLAR_ADDR(int32_t) work;               // the work list, see attend/work_list.cuh
  KVLAR_ADDR(float) partials;             // [slot][column][value_dim], then as many (max, sum) pairs
  KVLAR_ADDR(uint32_t) counters;          // [unit]: splits arrived; zero before and after a launch
  KVLAR_ADDR(uint32_t) status;
  float scale;
  float softcap;       // 0 = off
  int32_t window;      // 0 = off
  uint32_t segment_count;
  uint32_t seqs;
  uint32_t kv_heads;
  uint32_t group;      // query heads a kv head
  uint32_t query_rows;
  uint32_t head_dim;
  uint32_t value_dim;
  uint32_t query_tiles;      // tiles of packed (row, head) columns a kv head
  uint32_t slots;            // partial results that `partials` has room for
  uint32_t own_cell_tiles;   // 0 = balanced; else tiles a split, whatever else is in the batch
  uint32_t ctas;             // CTAs that share the work
  uint32_t out_dtype;        // KVLAR_DTYPE_*
  uint32_t columns;          // packed (row, head) columns a query tile: 8 or 16
  uint32_t units;            // what is computed as a whole: here seqs * kv_heads * query_tiles
  uint32_t stages;           // tiles of a warp's ring: 2 or 3
  // attend_quantized alone, from here on.
  uint32_t stage_bytes;      // of a tile of the ring
  uint32_t q_dtype;          // KVLAR_DTYPE_* of q and of rows that are stored as they are
  uint32_t key_codec;        // of all segments that are not
  uint32_t value_codec;
  uint32_t rotated_keys;     // 1: their keys are rotated (KvlarFormat.hadamard), and so are queries
  uint32_t int8_queries;     // 1: queries are rounded to 8 bits, one scale a head
  uint32_t reserved[2];
} KvlarAttend;
KVLAR_CHECK_SIZE(KvlarAttend, 1216);

// attend_cut: attend, where of one segment only rows whose score is at or above a cut (select/order.cuh) are visible, and its
// first and last ones.
typedef struct {
  KvlarAttend attend;               // dense segments
  KVLAR_ADDR(const float) scores;   // [seqs][kv_heads][score_stride], by the segment's rows
  int64_t score_stride;             // elements
  KVLAR_ADDR(const uint64_t) cuts;  // [seqs][kv_heads]
  uint32_t segment;                 // which: rows of the others are all visible
  uint32_t sink_rows;               // first rows, always visible
  uint32_t recent_rows;             // last rows of the segment's length, always visible
  uint32_t reserved;
} KvlarAttendCut;
KVLAR_CHECK_SIZE(KvlarAttendCut, 1256);

// The k largest scores of sets of rows, beside their first and last scores, as a cut a set (select/order.cuh).
typedef struct {
  KVLAR_ADDR(const float) scores;     // [sets][set_rows][score_stride], of which the first `members` rows are a set
  KVLAR_ADDR(const int32_t) lengths;  // [sets * set_rows / length_rows]; null = row_count
  KVLAR_ADDR(const int32_t) ks;       // [sets] how many are kept, sinks and recent rows counted, k at most; null = k
  KVLAR_ADDR(const uint32_t) histogram;  // [sets][set_rows][KVLAR_SCORE_BINS], of the scores of each length; may be null
  KVLAR_ADDR(uint64_t) cuts;          // [sets], or [rows] where there is a floor; may be null where it is not read, as may be
  KVLAR_ADDR(int32_t) counts;         // [rows]
  KVLAR_ADDR(int32_t) selected;       // [rows][k] ascending, -1 behind them
  KVLAR_ADDR(uint8_t) mask;           // [rows][row_count]
  KVLAR_ADDR(uint64_t) candidates;    // [sets][members][row_count]: kvlar_topk_cut alone, as are the three below
  KVLAR_ADDR(uint32_t) bins;          // [sets][KVLAR_SCORE_BINS]; zero before and after both launches
  KVLAR_ADDR(uint32_t) found;         // [sets] likewise
  KVLAR_ADDR(uint32_t) counters;      // [sets] likewise
  int64_t score_stride;               // elements
  int64_t k_stride;                   // of ks: 1, or 0 for one k
  uint32_t rows;                      // of all sets: members * sets
  uint32_t row_count;
  uint32_t k;
  uint32_t sink_rows;                 // first rows, always kept
  uint32_t recent_rows;               // last rows of the length, always kept
  uint32_t members;                   // rows of a set
  uint32_t parts;                     // CTAs a row of kvlar_topk_bins and kvlar_topk_cut
  uint32_t strict;                    // kvlar_topk_cut: keep what is above the k-th largest score, not that score
  uint32_t floor;                     // largest scores of each row that are kept too; their cuts are in `cuts` by then
  uint32_t set_rows;                  // rows from the first of a set to that of the next
  uint32_t length_rows;               // neighbouring rows (those between sets counted) that share a length
  uint32_t reserved;
} KvlarTopk;
KVLAR_CHECK_SIZE(KvlarTopk, 160);

// scan: logits of every row of one segment, their log-sum-exp, and one score a row and kv head.
typedef struct {
  KvlarAttend attend;             // one segment, of which the keys alone are read; one query row; out is not written
  KVLAR_ADDR(float) scores;       // [seqs][kv_heads][row_count]; may be null
  KVLAR_ADDR(float) logits;       // [seqs][kv_heads * group][row_count]; may be null
  KVLAR_ADDR(uint32_t) histogram; // [seqs][kv_heads][KVLAR_SCORE_BINS], of the scores of rows held; may be null
  KVLAR_ADDR(uint32_t) counts;    // as many, with a histogram or a selection; zero before and after a launch
  uint32_t row_count;             // columns of scores and logits
  uint32_t method;                // KVLAR_SCORE_MEAN_LOGIT or KVLAR_SCORE_MAX_LOGIT: reduce makes the other
  uint32_t fill;                  // 1: rows beyond a length get -inf
  uint32_t shared_bins;           // bytes into dynamic shared memory, as are the others: of a histogram
  uint32_t shared_tables;         // pq: of the centroids or the score tables
  uint32_t shared_queries;        // kvlar_scan_rows_*: of the queries
  uint32_t code_log;              // pq: log2 of the 16-byte chunks of a row in shared memory
  uint32_t table_heads;           // pq, score tables: query heads an entry: 1, 2, 4 or 8
  KvlarTopk select;               // of the scores, a set a kv head; cuts null = no selection. Read: cuts, ks, k, sinks, recent rows
} KvlarScan;
KVLAR_CHECK_SIZE(KvlarScan, 1440);

// reduce: logits of query heads to one score a row and kv head.
typedef struct {
  KVLAR_ADDR(const float) logits;     // [seqs][kv_heads * group][row_count]
  KVLAR_ADDR(const float) lse;        // [seqs][kv_heads * group]; KVLAR_SCORE_MAX_PROB alone
  KVLAR_ADDR(float) scores;           // [seqs][kv_heads][row_count]; may be null
  KVLAR_ADDR(uint32_t) histogram;     // [seqs][kv_heads][KVLAR_SCORE_BINS]; may be null
  KVLAR_ADDR(uint32_t) counts;        // as many, with a histogram alone; zero before and after a launch
  KVLAR_ADDR(uint32_t) counters;      // [seqs][kv_heads] likewise
  KVLAR_ADDR(const int32_t) lengths;  // rows held, [seqs][head?]; null = row_count
  int64_t length_seq_stride;
  int64_t length_head_stride;
  uint32_t seqs;
  uint32_t kv_heads;
  uint32_t group;
  uint32_t row_count;
  uint32_t method;                    // KVLAR_SCORE_*
  uint32_t fill;                      // 1: rows beyond a length get -inf, else they are left alone
  uint32_t blocks;                    // CTAs a (sequence, kv head)
  uint32_t reserved;
} KvlarReduce;
KVLAR_CHECK_SIZE(KvlarReduce, 104);

// The fewest rows that hold a share of the softmax mass of their logits (select/topp.cu).
typedef struct {
  KvlarTopk rows;                     // sets of one row; scores are logits; k is the width of lists; ks, floor: none
  KVLAR_ADDR(float) mass;             // [rows]: of what is kept; may be null
  KVLAR_ADDR(const int32_t) limits;   // (k_min, k_max); null = those below
  double top_p;
  uint32_t k_min;
  uint32_t k_max;
  uint32_t weight_log2;               // weights are multiples of 2^-weight_log2, so that their sums are exact
  uint32_t in_bins;                   // 1: cut in steps of 1/16 below the largest logit
} KvlarTopp;
KVLAR_CHECK_SIZE(KvlarTopp, 200);

// How many rows each layer, or each head of a layer, may keep (budget/budget.cu).
typedef struct {
  KVLAR_ADDR(const int32_t) counts;   // [sets][seen][heads]: of the best scores; budget_heads: [sets][heads]
  KVLAR_ADDR(const int32_t) lengths;  // [sets / length_sets]: rows that scores are of; null = row_count
  KVLAR_ADDR(int32_t) budgets;        // [sets][layers]; budget_heads: [sets][heads]
  KVLAR_ADDR(int32_t) ks;             // [sets][layers][heads] the same a row, and `forced` more; may be null
  double head_share;                  // budget_heads: 1 - alpha
  uint64_t beta;                      // KVLAR_BUDGET_PYRAMID
  uint32_t sets;
  uint32_t length_sets;               // neighbouring sets that share a length
  uint32_t layers;                    // up to 1024
  uint32_t heads;
  uint32_t row_count;
  uint32_t base;                      // rows of a head, on average
  uint32_t forced;                    // rows that are kept beside a budget
  uint32_t method;                    // KVLAR_BUDGET_*
  uint32_t seen;                      // KVLAR_BUDGET_DYNAMIC: layers that this round is of
  uint32_t known;                     // likewise: layers that had a round before
  uint32_t most;                      // likewise: a layer's budget before its first round
  uint32_t head_floor;                // budget_heads: what every head gets
} KvlarBudget;
KVLAR_CHECK_SIZE(KvlarBudget, 96);

// Which rows compact keeps: marked ones, or those whose score is at or above a cut (select/order.cuh), and all rows whose
// column is none.
typedef struct {
  KVLAR_ADDR(const uint8_t) mask;     // [seqs][owners][stride], 0 = goes; null = by cut
  KVLAR_ADDR(const float) scores;     // likewise; by cut alone, as is the rest
  KVLAR_ADDR(const uint64_t) cuts;    // [set]: a set is `members` neighbours of [seqs][owners]
  KVLAR_ADDR(const int32_t) first;    // [seqs] position of column 0; null = a row's column is its index
  KVLAR_ADDR(const int32_t) counts;   // [seqs] columns, with `first` alone; null = columns
  int64_t stride;                     // elements
  uint32_t columns;                   // at most, and those of a member in a set
  uint32_t members;
  uint32_t sink_rows;                 // first and last columns, kept whatever the cut, as topk has it
  uint32_t recent_rows;
} KvlarKeep;
KVLAR_CHECK_SIZE(KvlarKeep, 64);

// compact: rows that are kept, moved together in place. An owner is what has rows of its own: a (layer, kv head or group).
typedef struct {
  KvlarRows rows;        // tables, lengths and positions are indexed by owner; its lengths are not used
  KvlarPool keys;        // heads are owners, or, with `key_layers`, those of a layer
  KvlarPool values;      // without values: zeros
  KvlarKeep keep;
  KVLAR_ADDR(const uint64_t) key_layers;    // [layer] addresses that take the place of keys.data; null = keys.data
  KVLAR_ADDR(const uint64_t) value_layers;
  KVLAR_ADDR(int32_t) lengths;              // [seqs][owners], strides as rows has it; replaced by those that are left
  KVLAR_ADDR(float) scores;                 // [seqs][owners][score_stride] by row index, moved along; may be null
  int64_t score_stride;
  KVLAR_ADDR(int32_t) source;               // [seqs][owners][source_stride] row that each came from; may be null
  int64_t source_stride;
  KVLAR_ADDR(uint32_t) status;
  uint32_t seqs;
  uint32_t owners;
  uint32_t owners_a_layer;  // owners where there are no layers
  uint32_t key_bytes;       // of a row: multiples of 16
  uint32_t value_bytes;     // 0 = no values
  uint32_t key_params;      // bytes of a row's scales and zeros: multiples of 4
  uint32_t value_params;
  uint32_t reserved;
} KvlarCompact;
KVLAR_CHECK_SIZE(KvlarCompact, 336);

// protect: a copy of scores in which sinks and recent rows, judged by position, have one given score. Scores that wait by
// position become their rows' first.
typedef struct {
  KvlarRows rows;                       // as compact has it
  KVLAR_ADDR(float) scores;             // [seqs][owners][stride] by row index; read, but those of staged rows: written
  KVLAR_ADDR(float) protected_scores;   // likewise
  KVLAR_ADDR(const int32_t) recent;     // [seqs] first position of the recent window; null = none
  KVLAR_ADDR(const float) staged;       // [seqs][owners][staged_stride]: scores of rows at staged_from[s] and on; null = none
  KVLAR_ADDR(const int32_t) staged_from;  // [seqs] position of column 0
  KVLAR_ADDR(uint32_t) status;
  int64_t stride;
  int64_t protected_stride;
  int64_t staged_stride;
  int32_t sink_positions;               // positions below it are sinks
  float value;
  uint32_t seqs;
  uint32_t owners;
  uint32_t row_count;                   // columns
  uint32_t fill;                        // 1: columns beyond a length get -inf, else they are left alone
  uint32_t blocks;                      // CTAs a (sequence, owner)
  uint32_t page_count;                  // valid page ids of the positions
  uint32_t staged_count;                // columns of staged scores; rows beyond them keep their own
  uint32_t reserved;
} KvlarProtect;
KVLAR_CHECK_SIZE(KvlarProtect, 192);
// score_window, score_column, score_repeat: what rows get of the attention of some queries, and the queries' log-sum-exp.
typedef struct {
  KvlarRows rows;                       // of keys; positions are not used: row t is seen by queries of rows t and later
  KvlarPool keys;
  KVLAR_ADDR(const void) q;             // [seqs][kv_heads * group][query_rows][head_dim], rotated
  int64_t q_seq_stride;                 // elements
  int64_t q_head_stride;
  int64_t q_row_stride;
  KVLAR_ADDR(float) lse;                // [seqs][kv_heads * group][query_rows]: kvlar_score_lse_* writes it
  KVLAR_ADDR(float) scores;             // [seqs][kv_heads][score_stride]
  int64_t score_stride;
  KVLAR_ADDR(const int32_t) spans;      // [seqs] (sink rows, first row of the chunk, rows of it): KVLAR_COLUMNS_CHUNK alone
  KVLAR_ADDR(const int32_t) previous;   // rows that have a score, [seq][head?]; null = rows before the queries' own
  int64_t previous_seq_stride;
  int64_t previous_head_stride;         // 0 = one for all heads
  KVLAR_ADDR(float) partials;           // kvlar_score_lse_*: [unit][split][column] pairs (max, sum)
  KVLAR_ADDR(uint32_t) counters;        // [unit]: splits arrived; zero before and after a launch
  KVLAR_ADDR(uint32_t) status;
  float scale;
  float decay;           // of scores that are there, where `accumulate`
  uint32_t seqs;
  uint32_t kv_heads;
  uint32_t group;        // query heads a kv head
  uint32_t query_rows;
  uint32_t head_dim;
  uint32_t row_count;    // columns of scores
  uint32_t columns;      // KVLAR_COLUMNS_*
  uint32_t from_start;   // 1: queries are those of rows 0, 1, ..; else of the last query_rows rows
  uint32_t over_rows;    // KVLAR_REDUCE_*
  uint32_t over_heads;   // likewise
  uint32_t pool;         // KVLAR_POOL_*
  uint32_t pool_half;    // rows to either side
  uint32_t accumulate;   // 1: scores = decay * scores + new ones
  uint32_t fill;         // 1: columns beyond the rows that are scored get -inf
  uint32_t query_warps;  // kvlar_score_lse_*: warps that share the queries; the rest of the 4 share the rows
  uint32_t query_tiles;  // likewise: CTAs that share them
  uint32_t key_splits;   // likewise: CTAs that share the rows
  uint32_t splits;       // kvlar_score_rows_*: CTAs a (sequence, kv head)
  uint32_t chunk_rows;   // likewise: queries of a head in shared memory at a time, a multiple of 8
  uint32_t resident;     // likewise: 1 = those of all heads are there all the time
  uint32_t ring_rows;    // likewise: rows whose sums are there, a power of two
  uint32_t shared_queries;  // likewise: bytes into dynamic shared memory
  uint32_t shared_lse;
  uint32_t shared_sums;
} KvlarScore;
KVLAR_CHECK_SIZE(KvlarScore, 344);

// score_gate: importance of tokens from their hidden states, by a gate of one layer (score/gate.cuh).
typedef struct {
  KVLAR_ADDR(const void) hidden;            // [seqs][rows][hidden_dim]: what the layer's attention takes
  int64_t hidden_seq_stride;                // elements; multiples of 8
  int64_t hidden_row_stride;
  KVLAR_ADDR(const void) weights;           // [kv_heads][16 (group + 1)][hidden_dim], type of hidden: queries of a head, its key
  KVLAR_ADDR(const void) sinks;             // [kv_heads][3][8 ceil(sink_count / 8)][16], likewise: the sum of the 3 is a sink
                                            // key times q_norm log2(e) / 4
  KVLAR_ADDR(const float) bias;             // [kv_heads][group][16]
  KVLAR_ADDR(const float) diagonal;         // [16]: q_norm k_norm log2(e) / 4
  KVLAR_ADDR(const float) offsets;          // [kv_heads][group]: b log2(e)
  KVLAR_ADDR(float) scores;                 // [seqs][kv_heads][columns]
  int64_t score_seq_stride;                 // elements
  int64_t score_head_stride;
  KVLAR_ADDR(const int32_t) first_columns;  // [seqs]: column of a sequence's row 0; null = 0
  KVLAR_ADDR(const int32_t) counts;         // [seqs]: rows that there are; null = all
  KVLAR_ADDR(float) partials;               // where the hidden dimension is split, as are
  KVLAR_ADDR(uint32_t) counters;            // [row tile][kv head]; zero before and after a launch
  KVLAR_ADDR(uint32_t) status;
  uint32_t seqs;
  uint32_t rows;
  uint32_t hidden_dim;
  uint32_t kv_heads;
  uint32_t group;
  uint32_t sink_count;
  uint32_t columns;                         // first column and row beyond it: not written, and reported as a bad slot
  uint32_t splits;                          // CTAs that share the hidden dimension of a tile
} KvlarScoreGate;
KVLAR_CHECK_SIZE(KvlarScoreGate, 160);

// score_keys: scores of cached rows from keys and values alone (score/keys.cuh).
typedef struct {
  KvlarRows rows;
  KvlarPool keys;
  KvlarPool values;                // KVLAR_KEYS_LAGKV and KVLAR_KEYS_VALUE_KEY_RATIO alone
  KVLAR_ADDR(float) scores;        // [seqs][kv_heads][max_rows]
  int64_t score_seq_stride;        // elements
  int64_t score_head_stride;
  KVLAR_ADDR(float) sums;          // KVLAR_KEYS_KEYDIFF, as are the two below: sum of k / |k|, [seqs][kv_heads][head_dim]
  KVLAR_ADDR(float) partials;      // [seqs][kv_heads][blocks of sums][head_dim]
  KVLAR_ADDR(uint32_t) counters;   // [seqs][kv_heads]; zero before and after a launch
  KVLAR_ADDR(uint32_t) status;
  uint32_t seqs;
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t value_dim;
  uint32_t method;                 // KVLAR_KEYS_*
  uint32_t fill;                   // 1: rows beyond a length get -inf, else they are left alone
  uint32_t blocks;                 // CTAs a (sequence, kv head) of the launch that writes scores
  uint32_t sum_blocks;             // and of the one that sums keys
} KvlarScoreKeys;
KVLAR_CHECK_SIZE(KvlarScoreKeys, 264);

// How attend_lowrank divides a CTA's dynamic shared memory; bytes from its start, multiples of 16.
typedef struct {
  uint32_t basis;         // the tile's heads' basis rows, in the order of the rebuild; only where `resident`
  uint32_t basis_sums;    // fp32 [heads][padded_dim]: int8 latents only
  uint32_t means;         // fp32 [heads][padded_dim]: with key_mean only
  uint32_t turns;         // cos and sin of rows 0 .. 31 of a tile
  uint32_t queries;       // unrotated by the tile, as B fragments
  uint32_t warps;         // from here on, warp_bytes each
  uint32_t warp_bytes;
  uint32_t warp_queries;  // within a warp's part: queries of the tile at hand
  uint32_t warp_ring;     // likewise: two stages
  uint32_t stage_bytes;
  uint32_t stage_values;  // within a stage
  uint32_t stage_key_params;
  uint32_t stage_value_params;
  uint32_t stage_positions;
  uint32_t warp_count;
  uint32_t resident;      // 0: basis rows are read from global memory
} KvlarLowrankShared;
KVLAR_CHECK_SIZE(KvlarLowrankShared, 64);

// attend_lowrank: attend, where segments of a KVLAR_LATENT_* hold latents of keys before RoPE:
// k = RoPE(key_basis[head] z + key_mean[head]), and of values (v = value_basis[head] z) or dense values.
typedef struct {
  KvlarAttend attend;       // query_tiles are a set's; units = seqs * set_count * query_tiles
  KvlarRope rope;
  KVLAR_ADDR(const void) key_basis;      // [seqs?][kv_heads][head_dim][key_rank]; see KVLAR_LATENT_*
  int64_t key_basis_seq_stride;          // elements; 0 = one for all sequences
  KVLAR_ADDR(const float) key_scales;    // KVLAR_LATENT_INT8_BASIS: [seqs?][kv_heads][padded_dim / 2], a scale a rotary pair
  int64_t key_scales_seq_stride;
  KVLAR_ADDR(const float) key_mean;      // [kv_heads][head_dim]; may be null
  KVLAR_ADDR(const void) value_basis;    // [seqs?][kv_heads][value_dim][value_rank], type of q; null = dense values
  int64_t value_basis_seq_stride;
  KVLAR_ADDR(const int32_t) sets;        // [set_count] (key group, value group, heads, first), then the heads' indices
  uint32_t set_count;
  uint32_t heads_per_tile;  // kv heads a query tile
  uint32_t key_rank;        // multiples of 32
  uint32_t value_rank;      // 0 = dense values
  uint32_t slices;          // parts of the value rank (or 1): each takes a pass over the rows
  uint32_t slice_width;     // values a slice; the last may have fewer
  uint32_t padded_dim;      // head_dim, padded to a multiple of 32: the rebuild's order
  uint32_t latent;          // KVLAR_LATENT_*
  KvlarLowrankShared shared;
} KvlarAttendLowrank;
KVLAR_CHECK_SIZE(KvlarAttendLowrank, 1400);

// z = encoder x - offset, x being the rows of a group's kv heads, one after the other; and how it is divided.
typedef struct {
  KVLAR_ADDR(const void) x;  // [seqs][kv_heads][rows][dim]
  int64_t x_seq_stride;      // elements; multiples of 8
  int64_t x_head_stride;
  int64_t x_row_stride;
  KVLAR_ADDR(const void) encoder;     // [groups][rank][size * dim], type of x
  KVLAR_ADDR(const int32_t) members;  // [groups][size]: kv heads
  KVLAR_ADDR(const float) offset;     // [groups][rank]: the encoder times a mean of the rows; may be null
  uint32_t groups;
  uint32_t size;        // kv heads a group
  uint32_t dim;
  uint32_t rank;
  uint32_t rank_warps;  // of a CTA's 8: have 32 ranks each
  uint32_t sum_warps;   // share the contraction of those (1 in _m64 kernels); the rest of the 8 have further rows
  uint32_t row_blocks;  // CTAs that share the rows
  uint32_t parts;       // CTAs that share the ranks; 1 in a _m64 kernel and int8: one takes them all, in turn
} KvlarProjection;
KVLAR_CHECK_SIZE(KvlarProjection, 88);

// project: rows to latents [seqs][groups][rows][rank].
typedef struct {
  KvlarProjection projection;
  KVLAR_ADDR(void) out;
  int64_t out_seq_stride;  // elements
  int64_t out_group_stride;
  int64_t out_row_stride;
  uint32_t seqs;
  uint32_t rows;
  uint32_t dtype;      // KVLAR_DTYPE_* of x and the encoder
  uint32_t out_dtype;  // likewise, or KVLAR_DTYPE_F32
} KvlarProject;
KVLAR_CHECK_SIZE(KvlarProject, 136);

// One side of append_lowrank: what becomes of new keys, or of new values.
typedef struct {
  KvlarPool pool;
  KvlarProjection projection;     // KVLAR_SIDE_STORE: x is [seqs][groups][rows][rank], at any strides
  KVLAR_ADDR(float) scratch;      // [group][row block][16 rows][stored]: of int8 latents where CTAs have parts
  KVLAR_ADDR(uint32_t) counters;  // [group][row block]: parts that are there; zero before and after a launch
  uint32_t mode;    // KVLAR_SIDE_*
  uint32_t codec;   // KVLAR_CODEC_* of the stored rows
  uint32_t stored;  // values a row with its padding (zeros)
  uint32_t ctas;
} KvlarLatentSide;
KVLAR_CHECK_SIZE(KvlarLatentSide, 168);

// append_lowrank: new keys (before RoPE) and values become latents, encoded and written at their slots.
typedef struct {
  KvlarRows rows;                       // tables and positions are indexed by group
  KvlarLatentSide sides[2];             // keys, values
  KVLAR_ADDR(const int32_t) positions;  // [seqs][new_rows]; null where rows has none
  KVLAR_ADDR(const int32_t) slots;      // row that a new row goes to, [seqs][new_rows]; negative = skip
  int64_t slot_seq_stride;
  KVLAR_ADDR(uint32_t) status;
  uint32_t seqs;
  uint32_t new_rows;
  uint32_t dtype;                       // KVLAR_DTYPE_* of x and the encoders
  uint32_t reserved;
} KvlarAppendLowrank;
KVLAR_CHECK_SIZE(KvlarAppendLowrank, 464);

// append: rotate keys, encode keys and values, write both (and positions) at the rows of `slots`.
typedef struct {
  KvlarRows rows;
  KvlarPool key_pool;
  KvlarPool value_pool;
  KVLAR_ADDR(const void) k;  // [seqs][kv_heads][new_rows][head_dim], before RoPE
  int64_t k_seq_stride;
  int64_t k_head_stride;
  int64_t k_row_stride;
  KVLAR_ADDR(const void) v;  // [seqs][kv_heads][new_rows][value_dim]
  int64_t v_seq_stride;
  int64_t v_head_stride;
  int64_t v_row_stride;
  KVLAR_ADDR(const int32_t) positions;  // [seqs][new_rows]
  KVLAR_ADDR(const int32_t) slots;      // row index a new row goes to, [seqs][head?][new_rows]; negative = skip
  int64_t slot_seq_stride;
  int64_t slot_head_stride;             // 0 = one for all heads
  KvlarRope rope;
  KVLAR_ADDR(uint32_t) status;
  KvlarFormat key_format;
  KvlarFormat value_format;
  uint32_t seqs;
  uint32_t kv_heads;
  uint32_t new_rows;
  uint32_t head_dim;
  uint32_t value_dim;
  uint32_t dtype;        // KVLAR_DTYPE_* of k and v
  // kvlar_append_scored alone, from here on: of the key as it is stored, where it is stored dense, else rounded to dtype.
  KVLAR_ADDR(float) key_scores;   // -|k| at the row's slot, [seqs][kv_heads][max_rows]; may be null
  int64_t key_score_seq_stride;   // elements
  int64_t key_score_head_stride;
  KVLAR_ADDR(float) key_sums;     // grows by k / |k|, [seqs][kv_heads][head_dim]; may be null; new_rows is 1
} KvlarAppend;
KVLAR_CHECK_SIZE(KvlarAppend, 408);

// append_groups: append of rows that stay as they are for now, and rows that have stayed long enough encoded, several at a
// time. Rows are counted from the first that is ever encoded; those before it (sinks) are negative.
typedef struct {
  KvlarAppend exact;             // where new rows stay; its formats are the type of k and v
  KvlarRows rows;                // of encoded rows; lengths and positions are not used
  KvlarPool key_pool;
  KvlarPool value_pool;
  KvlarFormat key_format;        // channel-wise: of groups of pack_rows rows
  KvlarFormat value_format;
  KVLAR_ADDR(const int32_t) source;   // [seqs][source_pages]: pages of exact.key_pool and value_pool that hold earlier rows
  KVLAR_ADDR(const int32_t) packing;  // [seqs] (rows before this step, row that `source` begins with, first row to encode,
                                      // how many, a multiple of pack_rows; the first too)
  uint32_t source_pages;
  uint32_t pack_rows;            // rows that are encoded together; pages hold multiples of it
  uint32_t max_packs;            // of a sequence in one launch
  uint32_t row_ctas;             // CTAs before those that encode
} KvlarAppendGroups;
KVLAR_CHECK_SIZE(KvlarAppendGroups, 664);

// encode: dense rows to stored rows; decode: stored rows to dense ones.
typedef struct {
  KvlarRows rows;    // of encode only the table and the page size are used
  KvlarPool pool;
  KVLAR_ADDR(void) x;     // [seqs][heads][row_count][dim]
  int64_t x_seq_stride;
  int64_t x_head_stride;
  int64_t x_row_stride;
  KVLAR_ADDR(uint32_t) status;
  KvlarFormat format;
  uint32_t seqs;
  uint32_t heads;
  uint32_t row_count;
  uint32_t dim;
  uint32_t dtype;      // KVLAR_DTYPE_* of x
  uint32_t held_only;  // decode: whether rows beyond the length are left alone; else they become 0
} KvlarTranscode;
KVLAR_CHECK_SIZE(KvlarTranscode, 216);

// merge: attention results over disjoint sets of rows into the result over their union.
typedef struct {
  KVLAR_ADDR(const float) parts;      // [part_count][row_count][dim]
  KVLAR_ADDR(const float) part_lse;   // [part_count][row_count]
  KVLAR_ADDR(float) out;              // [row_count][dim]
  KVLAR_ADDR(float) lse;              // [row_count]
  uint32_t part_count;
  uint32_t row_count;
  uint32_t dim;
  uint32_t reserved;
} KvlarMerge;
KVLAR_CHECK_SIZE(KvlarMerge, 48);

// conformance: what one primitive does with given registers or bytes; see kernels/conformance.
typedef struct {
  KVLAR_ADDR(const uint32_t) in;
  KVLAR_ADDR(uint32_t) out;
  uint32_t count;  // elements
  uint32_t arg;    // which variant
} KvlarConformance;
KVLAR_CHECK_SIZE(KvlarConformance, 24);

#endif
