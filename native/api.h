/* What the C helper offers. Plain declarations only: the C files include this through mmapwal.h,
 * and cffi reads it as it stands. Every int result is 0 or more, or a negative errno, or one of the
 * MW_E_ codes below. Little-endian hosts only (mmapwal.h checks). */

/* ---- on disk (docs/FORMAT.md; mmapwal/format.py holds the same as numpy dtypes) ---- */

enum {
    MW_FORMAT_VERSION = 1,
    MW_FRAME_BYTES = 56,        /* header of a frame */
    MW_PAGE_BYTES = 4096,       /* header page of a segment, and of the index */
    MW_SLOT_BYTES = 32
};

enum mw_frame_type {
    MW_ENTRY = 1,
    MW_GAP = 2,                 /* stands for removed frames; payload_crc is the last one's header_crc */
    MW_END = 3,                 /* the segment is left; the next frame is in the next segment */
    MW_PAD = 4                  /* fills a commit up to commit_align_bytes */
};

enum { MW_FLAG_MORE = 1 };      /* the next frame belongs to the same batch */

struct mw_frame {
    uint32_t header_crc;        /* of the 52 bytes behind it, seeded with the segment's salt */
    uint32_t payload_crc;
    uint64_t lsn;
    uint64_t op;
    int64_t timestamp_ns;
    uint64_t durable_lsn;       /* all below it was durable when this frame was written */
    uint32_t length;            /* of the payload; GAP and PAD: of what is skipped */
    uint32_t link;              /* header_crc of the frame before; the salt for the first of a segment */
    uint32_t epoch;
    uint16_t kind;
    uint8_t type;
    uint8_t flags;
};

struct mw_segment_header {
    uint8_t magic[8];
    uint32_t version;
    uint32_t generation;
    uint8_t uuid[16];
    uint64_t id;
    uint64_t base_lsn;
    uint64_t capacity;          /* bytes for frames, behind the header page */
    uint32_t salt;
    uint32_t crc;               /* of all before it */
};

struct mw_slot {
    uint64_t lsn;               /* 0: empty. Stored last, zeroed first: readers check it twice */
    uint64_t op;
    int64_t timestamp_ns;
    uint32_t length;
    uint16_t kind;
    uint16_t reserved;
};

struct mw_progress {            /* written alternately: one of the two is always whole */
    uint64_t written_lsn;
    uint64_t durable_lsn;
    uint64_t watermark;
    uint32_t sequence;
    uint32_t check;             /* CRC32C of the 28 bytes before it, seeded with the journal's salt */
};

struct mw_index_header {
    uint8_t magic[8];
    uint32_t version;
    uint32_t slot_bytes;
    uint8_t uuid[16];
    uint64_t slot_count;
    uint32_t salt;
    uint32_t crc;               /* of all before it */
    uint8_t reserved[16];
    struct mw_progress progress[2];
    uint32_t wake;              /* counts publications: a futex word for followers */
    uint32_t waiting;           /* one of them sleeps, or is about to */
    uint64_t superblock_sequence; /* of the superblock in force: another one is to be read again */
};

/* ---- results below -4095: what is no errno ---- */

enum mw_error {
    MW_E_DUPLICATE = -10001,
    MW_E_STALE = -10002,
    MW_E_FULL = -10003,
    MW_E_BAD_OP = -10004,
    MW_E_BAD_KIND = -10005,
    MW_E_TOO_LARGE = -10006,
    MW_E_NEED_SEGMENT = -10007, /* prepare a segment, then call again */
    MW_E_NEED_EPOCH = -10008,   /* a write failed cleanly: start a new epoch, then call again */
    MW_E_BARRIER = -10009,      /* a removal holds these ops: wait for it, then call again */
    MW_E_POISONED = -10010,
    MW_E_CLOSED = -10011,
    MW_E_FORKED = -10012,
    MW_E_CORRUPT = -10013,
    MW_E_MISSING = -10014,
    MW_E_TABLE = -10015         /* a newer segment table is needed */
};

/* ---- checksums ---- */

uint32_t mw_crc32c(uint32_t seed, const void *data, uint64_t bytes);
int mw_crc32c_guarded(uint32_t seed, const void *data, uint64_t bytes, uint32_t *crc);

enum mw_crc32c_ways {
    MW_CRC32C_PORTABLE = 0,
    MW_CRC32C_INSTRUCTION = 1,
    MW_CRC32C_FOLD = 2,         /* by vectors of 256 bits */
    MW_CRC32C_FOLD_WIDE = 3,    /* 512 */
};

int mw_crc32c_best(void);       /* the way that is taken on this processor */
/* By a chosen way; -ENOTSUP where the processor has it not. */
int mw_crc32c_by(int way, uint32_t seed, const void *data, uint64_t bytes, uint32_t *crc);

/* ---- files ---- */

enum mw_method { MW_DSYNC = 1, MW_FDATASYNC = 2, MW_MSYNC = 3 };

struct mw_file {
    int fd;
    int dsync_fd;               /* opened O_DSYNC where RWF_DSYNC is refused; or -1 */
    int method;
    int unsynced;               /* MW_MSYNC: a store waits for its msync */
    uint8_t *map;               /* writable, for MW_MSYNC; or NULL */
    uint64_t bytes;
};

/* The table through which the committer writes; ctx is a struct mw_file or an injected storage. */
struct mw_io {
    int (*write)(void *ctx, uint64_t offset, const void *data, uint64_t bytes);
    int (*write_sync)(void *ctx, uint64_t offset, const void *data, uint64_t bytes);
    int (*sync)(void *ctx);
    void *ctx;
};

int mw_open(int dir_fd, const char *name, int flags, int mode);
int mw_set_nocow(int fd);
int64_t mw_fs_type(int fd);
int mw_file_write(void *file, uint64_t offset, const void *data, uint64_t bytes);
int mw_file_write_sync(void *file, uint64_t offset, const void *data, uint64_t bytes);
int mw_file_sync(void *file);
int mw_has_rwf_dsync(int fd);
int mw_file_close(struct mw_file *file);
int64_t mw_file_read(struct mw_file *file, uint64_t offset, void *data, uint64_t bytes);
int mw_file_zero(struct mw_file *file, uint64_t offset, uint64_t bytes);
void mw_fd_close(void *fd);
int mw_fd_sync(int fd);
int mw_fd_start_writeback(int fd, uint64_t offset, uint64_t bytes);
int mw_fd_datasync(int fd);
int mw_map(int fd, uint64_t bytes, int writable, void **address);
void mw_unmap(uint64_t bytes, void *address);
int mw_map_sync(void *address, uint64_t bytes);
int mw_populate(void *address, uint64_t bytes, int writable);
int mw_resident(void *address, uint64_t bytes);
int mw_copy_guarded(void *to, const void *from, uint64_t bytes);

/* ---- frames ---- */

uint64_t mw_frame_bytes(uint64_t payload_bytes);
uint32_t mw_frame_crc(const struct mw_frame *frame, uint32_t salt); /* what its header_crc has to be */
void mw_make_gap(struct mw_frame *gap, const struct mw_frame *last, uint64_t lsn, uint64_t bytes,
                 uint32_t link, uint32_t salt);

struct mw_removal { uint64_t first; uint64_t last; uint64_t below_lsn; };

enum mw_stop {
    MW_STOP_NONE = 0,
    MW_STOP_END = 1,            /* an END frame: on to the next segment */
    MW_STOP_LIMIT = 2,          /* the limit was reached */
    MW_STOP_BLANK = 3,          /* nothing was ever written here */
    MW_STOP_HEADER = 4,         /* checksum of the header */
    MW_STOP_PLACE = 5,          /* a right frame of another place */
    MW_STOP_LINK = 6,           /* does not follow the frame before it */
    MW_STOP_OLD_EPOCH = 7,      /* left behind by a cut */
    MW_STOP_FUTURE_EPOCH = 8,   /* newer than the superblock */
    MW_STOP_LENGTH = 9,
    MW_STOP_PAYLOAD = 10,       /* checksum of the payload */
    MW_STOP_TYPE = 11,
    MW_STOP_CONFLICT = 12,      /* two live ops want one slot */
    MW_STOP_OP = 13             /* an entry whose op is none */
};

struct mw_scan {
    /* in */
    const uint8_t *frames;      /* the first byte behind the header page */
    uint64_t base_lsn;
    uint64_t capacity;
    uint64_t limit_lsn;         /* stop here */
    uint64_t epoch_start_lsn;
    uint64_t watermark;
    const struct mw_removal *removals;
    struct mw_slot *slots;      /* filled with the newest live frame of each op; or NULL */
    uint64_t slot_count;
    uint32_t removal_count;
    uint32_t epoch;             /* the present one */
    uint32_t salt;
    uint32_t align_bytes;       /* above the durable LSN batches end at a multiple of it; 0: anywhere */
    /* in and out */
    uint32_t link;
    uint64_t lsn;
    uint64_t batch_lsn;         /* where the last whole batch ended */
    uint32_t batch_link;
    uint32_t last_epoch;
    uint64_t durable_lsn;       /* what is known of it, and the highest in a good frame */
    /* out */
    uint64_t frame_count;
    uint64_t entry_count;
    uint64_t hidden_count;      /* entries that a removal hides */
    uint64_t op;                /* of the bad frame, when its header can be believed; or 0 */
    uint64_t first_op;          /* all ops that came into the slots are within these two; 0: none did */
    uint64_t last_op;
    uint32_t first_epoch;       /* of the first good frame */
    int stop;
};

int mw_scan(struct mw_scan *scan);
/* Good frames from scan->lsn on, at any place: raises scan->durable_lsn, counts them. */
int mw_hunt(struct mw_scan *scan);
int mw_seek(struct mw_scan *scan);

struct mw_run {                 /* neighbouring frames of a segment, all kept or all dead */
    uint64_t from_lsn;
    uint64_t to_lsn;
    uint64_t last_lsn;          /* the last frame in it */
    uint64_t gap_bytes;         /* of it that gaps stand for already */
    uint32_t link;              /* header_crc of the frame before the run */
    uint32_t keep;
};

/* Runs of kept frames (named by `slots`, or not entries of anyone) and dead ones, from *lsn on. */
int64_t mw_plan(const uint8_t *frames, uint64_t base_lsn, uint64_t end_lsn, uint32_t salt,
                const struct mw_slot *slots, uint64_t slot_count, uint64_t *lsn, uint32_t *link,
                struct mw_run *runs, uint64_t max_runs);

/* ---- the index ---- */

struct mw_summary {
    uint64_t live;
    uint64_t first_op;          /* 0: none */
    uint64_t last_op;
};

/* Of two neighbouring stretches of frames, each scanned into slots of its own: whether two ops want
 * one slot; and the slots of both as one, with what they hold added to the summary. */
int mw_slots_clash(const struct mw_slot *older, const struct mw_slot *newer, uint64_t slot_count);
int mw_slots_merge(struct mw_slot *to, const struct mw_slot *older, const struct mw_slot *newer,
                   uint64_t count, struct mw_summary *summary);
int mw_slots_clear(struct mw_slot *slots, uint64_t slot_count);
int mw_slots_summary(const struct mw_slot *slots, uint64_t slot_count, struct mw_summary *out);
int mw_slots_copy(struct mw_slot *to, const struct mw_slot *from, uint64_t slot_count);
int mw_progress_read(const struct mw_index_header *page, struct mw_progress *out);

struct mw_segment_ref { uint64_t base_lsn; uint64_t capacity; const uint8_t *frames; uint32_t salt; };
struct mw_table { const struct mw_segment_ref *refs; uint64_t count; };

struct mw_columns {             /* one row an entry */
    uint64_t *op;
    uint64_t *start;            /* of the payload, in its segment's file */
    uint64_t *end;
    uint64_t *lsn;
    int64_t *timestamp_ns;
    uint32_t *segment;          /* row of the table */
    uint32_t *checksum;
    uint16_t *kind;
};

struct mw_cursor {
    uint64_t op;                /* next to look at; on an error, the one that caused it */
    uint64_t last_op;
    uint64_t lsn;               /* on an error: where */
    uint32_t segment;           /* on MW_E_TABLE: the row whose mapping is missing, or UINT32_MAX */
    uint32_t uniform;           /* all rows are in one segment */
    uint64_t stride;            /* and all payloads of one length, this far apart; or 0 */
};

/* Fills at most `max` rows with the live entries of cursor->op .. cursor->last_op, checked when
 * `verify`. `ops` NULL: walks the ring; else looks up these, as many as `op_count`, from *taken on. */
int64_t mw_gather(const struct mw_slot *slots, uint64_t slot_count, const struct mw_table *table,
                  struct mw_cursor *cursor, const uint64_t *ops, uint64_t op_count, uint64_t *taken,
                  struct mw_columns *out, uint64_t max, int verify);
int mw_lookup(const struct mw_slot *slots, uint64_t slot_count, uint64_t op, struct mw_slot *out);
/* Checks the frame and, when `to` is given, copies its payload there. */
int mw_check_frame(const uint8_t *frames, uint64_t base_lsn, uint64_t capacity, uint32_t salt,
                   uint64_t lsn, uint64_t op, struct mw_frame *header, void *to, uint64_t to_bytes);

/* ---- followers ---- */

int mw_follow_word(const struct mw_index_header *page, uint32_t *wake);
int mw_follow_sequence(const struct mw_index_header *page, uint64_t *sequence);
void mw_follow_stir(struct mw_index_header *page);

enum mw_walk_stop {
    MW_WALK_LIMIT = 0,          /* the limit was reached */
    MW_WALK_END = 1,            /* an END frame: on to the next segment */
    MW_WALK_GAP = 2,            /* a GAP frame: what was there is not known */
    MW_WALK_STALE = 3,          /* an entry at or below the watermark */
    MW_WALK_FULL = 4            /* no row is left */
};

struct mw_walk {
    /* in */
    const uint8_t *frames;      /* the first byte behind the header page */
    uint64_t base_lsn;
    uint64_t capacity;
    uint64_t limit_lsn;         /* stop here */
    uint64_t from_op;           /* entries below it are passed by */
    uint64_t watermark;
    const struct mw_removal *removals; /* what they hide is passed by */
    struct mw_slot *slots;      /* stored into instead of rows, and only what is live; or NULL */
    uint64_t slot_count;
    uint32_t removal_count;
    uint32_t salt;
    uint32_t segment;           /* for the rows */
    int past_gaps;              /* GAP frames are passed by too */
    /* in and out */
    uint64_t lsn;
    /* out */
    uint64_t op;                /* of the frame that it stopped at, when its header can be believed; or 0 */
    uint64_t behind_lsn;        /* MW_WALK_GAP: of the next frame */
    uint64_t stride;            /* all rows are of one length, and so far apart; or 0 */
    uint64_t highest_op;        /* among the rows; or 0 */
    int stop;
    int failed;                 /* MW_E_CORRUPT or a negative errno; what comes before it counts all the same */
};

int64_t mw_walk(struct mw_walk *walk, struct mw_columns *out, uint64_t max);

struct mw_next {                /* what a follower that waits wants to have when it is woken */
    /* in */
    struct mw_walk *walk;
    struct mw_columns *out;
    uint64_t max;
    uint64_t superblock_sequence; /* of the one that the walk is by: where another is in force, nothing is taken */
    int written;                /* up to what is written; else to what is durable */
    /* in and out */
    uint64_t count;             /* 0 before: how many rows were filled */
    /* out, when there are some */
    uint64_t lsn;               /* behind them */
    uint64_t durable_lsn;       /* as it was published */
    uint64_t op;                /* of the first, as all below: one entry by itself needs no columns */
    uint64_t start;
    uint64_t end;
    int64_t timestamp_ns;
    uint64_t kind;
};

int mw_follow_spin(const struct mw_index_header *page, uint32_t seen, int64_t timeout_ns, struct mw_next *next);
int mw_follow_wait(struct mw_index_header *page, uint32_t seen, int64_t timeout_ns, int64_t soon_ns, int tells,
                   struct mw_next *next);

/* ---- the writer: staging and group commit ---- */

enum mw_durability { MW_SYNC = 1, MW_OS = 2, MW_BUFFERED = 3 };
enum { MW_REPLACE = 1, MW_NOW = 2, MW_EVEN = 4 };
enum { MW_SYNC_STAGED = 1, MW_SYNC_CLOSING = 2 };

enum mw_stage {
    MW_STAGE_NONE = 0,
    MW_STAGE_WRITE = 1,
    MW_STAGE_SYNC = 2,
    MW_STAGE_WRITE_SYNC = 3,
    MW_STAGE_INDEX = 4,
    MW_STAGE_OUTSIDE = 5        /* named by whoever called mw_writer_poison */
};

struct mw_config {
    struct mw_summary summary;  /* of the slots */
    struct mw_index_header *page;
    struct mw_slot *slots;
    uint64_t slot_count;
    uint64_t watermark;
    uint64_t lsn;               /* the tail: written and durable */
    uint64_t buffer_bytes;      /* MW_BUFFERED: handed to the kernel beyond this */
    uint64_t superblock_sequence;
    uint32_t epoch;
    uint32_t link;
    uint32_t align_bytes;
    int durability;
    int separate_sync;          /* write, then sync: for files whose writes may allocate */
};

struct mw_target {              /* a segment that takes frames */
    uint64_t id;
    uint64_t base_lsn;
    uint64_t capacity;
    struct mw_io *io;
    uint32_t salt;
};

struct mw_state {
    uint64_t live;
    uint64_t first_op;
    uint64_t last_op;
    uint64_t next_op;
    uint64_t watermark;
    uint64_t written_lsn;
    uint64_t durable_lsn;
    uint64_t staged_bytes;
    uint64_t tail_id;           /* the segment that is written to */
    uint64_t stage_id;          /* the one that frames are staged for */
    uint64_t stage_room;        /* what still fits there */
    uint64_t commits;
    uint64_t syncs;
    uint64_t entries;
    uint64_t bytes;
    uint32_t targets;           /* prepared and not begun */
    uint32_t target_room;       /* how many more can be added before a flush */
    uint32_t epoch;
    uint32_t link;
    int epoch_owed;
    int poison_stage;
    int poison_errno;
    int closed;
};

struct mw_writer;
struct mw_writer *mw_writer_new(const struct mw_config *config);
void mw_writer_free(struct mw_writer *w);
int64_t mw_append(struct mw_writer *w, const char *data, uint64_t bytes, int64_t op, int32_t kind,
                  int64_t timestamp_ns, uint32_t flags);
int64_t mw_append_next(struct mw_writer *w, const char *data, uint64_t bytes, int32_t kind);
/* `lengths`: `count` packed uint64_t, whose sum `data` holds; MW_EVEN: one, for each of them. */
int64_t mw_append_many(struct mw_writer *w, const char *data, const void *lengths,
                       const uint16_t *kinds, uint64_t count, int64_t first_op, int32_t kind,
                       int64_t timestamp_ns, uint32_t flags);
int mw_sync(struct mw_writer *w, uint32_t flags);
int mw_flush(struct mw_writer *w, uint64_t below_lsn);
int mw_writer_add_target(struct mw_writer *w, const struct mw_target *target);
int mw_writer_drop_target(struct mw_writer *w);
int mw_writer_rotate(struct mw_writer *w);
int64_t mw_writer_ended(struct mw_writer *w, uint64_t id);
int mw_writer_wait_wanted(struct mw_writer *w);
int mw_writer_barrier(struct mw_writer *w, uint64_t first, uint64_t last);
int64_t mw_writer_remove(struct mw_writer *w, uint64_t first, uint64_t last, uint64_t below_lsn);
int mw_writer_note_superblock(struct mw_writer *w, uint64_t sequence);
int64_t mw_writer_set_watermark(struct mw_writer *w, uint64_t op);
int mw_writer_set_epoch(struct mw_writer *w, uint32_t epoch);
void mw_writer_poison(struct mw_writer *w, int error);
void mw_writer_close(struct mw_writer *w);
void mw_writer_fork(struct mw_writer *w);
int64_t mw_writer_remaining(struct mw_writer *w);
int mw_writer_state(struct mw_writer *w, struct mw_state *out);

/* ---- the writer, for an event loop ---- */

enum { MW_OUTCOMES = 8 };
struct mw_outcome { uint64_t ticket; int32_t result; uint32_t reserved; }; /* of all up to it, from the one before on */

int64_t mw_submit_next(struct mw_writer *w, const char *data, uint64_t bytes, int32_t kind);
int64_t mw_submit_many(struct mw_writer *w, const char *data, const void *lengths,
                       const uint16_t *kinds, uint64_t count, int64_t first_op, int32_t kind,
                       int64_t timestamp_ns, uint32_t flags);
int mw_outcomes(struct mw_writer *w, struct mw_outcome *out);
int mw_committer_kick(struct mw_writer *w);
int mw_committer_lead(struct mw_writer *w);
int mw_committer_start(struct mw_writer *w, int event_fd, int threaded);
int mw_committer_stop(struct mw_writer *w);

/* ---- threads ---- */

int mw_aside(void (*run)(void *), void *arg);
