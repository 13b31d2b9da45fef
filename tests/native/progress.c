/* Reading the progress while it is published, without threads: between any two loads of a look the writer does all
 * that he might. Checks that what is found is whole, and never less than what was found before. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

static void between_loads(void);
#define __atomic_load_n(place, order) (between_loads(), __atomic_load_n(place, order))
#include "slots.c"
#undef __atomic_load_n

/* How far a publication has come when the reader goes on. */
enum stage { DONE, HALF_STORED, NOT_TOLD, STAGES };
enum { LOADS = 16, MOST = 3 }; /* of a look that is not repeated: fewer; publications at one moment */

static struct mw_index_header page;
static uint64_t published;
static enum stage stage;
static unsigned loads, at[2], count[2];
static enum stage leaves[2];
static bool is_looking;

static void complete(void) {
    if (stage == HALF_STORED) page.progress[(page.wake + 1) & 1].check ^= 1;
    if (stage != DONE) page.wake++;
    stage = DONE;
}

static void publish(unsigned times, enum stage leave) {
    for (unsigned i = 0; i < times; i++) {
        complete();
        published++;
        mw_progress_store(&page, 3 * published, 2 * published, published);
    }
    if (times == 0 || leave == DONE) return;
    page.wake--;
    if (leave == HALF_STORED) page.progress[(page.wake + 1) & 1].check ^= 1;
    stage = leave;
}

static void between_loads(void) {
    if (!is_looking) return;
    is_looking = false;
    for (int i = 0; i < 2; i++)
        if (loads == at[i]) publish(count[i], leaves[i]);
    loads++;
    is_looking = true;
}

static uint64_t look(void) {
    struct mw_progress p;
    loads = 0;
    is_looking = true;
    int rc = mw_progress_read(&page, &p);
    is_looking = false;
    if (rc != 0 || p.written_lsn != 3 * p.watermark || p.durable_lsn != 2 * p.watermark) abort();
    return p.watermark;
}

static void try_all_stages(unsigned long *tried) {
    for (unsigned code = 0; code < 2u * STAGES * STAGES * STAGES; code++) {
        memset(&page, 0, sizeof page);
        published = 0;
        stage = DONE;
        publish(2 + code % 2, code / 2 % STAGES);
        leaves[0] = code / 2 / STAGES % STAGES;
        leaves[1] = code / 2 / STAGES / STAGES;
        unsigned wanted[2] = {count[0], count[1]};
        count[0] = count[1] = 0;
        uint64_t before = look();
        count[0] = wanted[0], count[1] = wanted[1];
        uint64_t found = look();
        if (found < before) {
            fprintf(stderr, "%llu behind %llu: %u at load %u, %u at load %u, case %u\n", (unsigned long long)found,
                    (unsigned long long)before, count[0], at[0], count[1], at[1], code);
            abort();
        }
        ++*tried;
    }
}

int main(void) {
    unsigned long tried = 0;
    for (at[0] = 0; at[0] < LOADS; at[0]++)
        for (at[1] = at[0]; at[1] < LOADS; at[1]++)
            for (unsigned n = 0; n < MOST * (MOST + 1); n++) {
                count[0] = 1 + n % MOST;
                count[1] = n / MOST;
                try_all_stages(&tried);
            }
    printf("%lu looks\n", tried);
    return 0;
}
