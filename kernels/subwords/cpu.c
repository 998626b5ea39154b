/* Merges of byte-pair encoding, a word at a time, with a heap of the pairs that may merge. */

typedef struct {
    const uint64_t *pairs; /* ascending: left id * 2^32 + right id */
    const uint32_t *ranks; /* of the pairs */
    const uint32_t *merged; /* id that the pair of a rank becomes */
    int64_t number;
} MergeTable;

/* A word of `size` ids. `after` and `before` link the places of ids that are left. */
typedef struct {
    uint32_t *ids;
    int64_t size, *after, *before;
    uint64_t *heap; /* rank * 2^32 + place; the smallest first */
    int64_t held;
} MergeWord;

enum { NO_RANK = -1 };
static const uint32_t MERGED_AWAY = UINT32_MAX;

static int64_t rank_of_pair(const MergeTable *table, uint32_t left, uint32_t right) {
    const uint64_t pair = (uint64_t)left << 32 | right;
    int64_t low = 0, number = table->number;
    while (number > 0) {
        const int64_t half = number / 2;
        const int beyond = table->pairs[low + half] < pair;
        low = beyond ? low + half + 1 : low;
        number = beyond ? number - half - 1 : half;
    }
    const int found = low < table->number && table->pairs[low] == pair;
    return found ? (int64_t)table->ranks[low] : NO_RANK;
}

static void heap_push(MergeWord *word, uint64_t key) {
    int64_t at = word->held++;
    while (at > 0 && word->heap[(at - 1) / 2] > key) {
        word->heap[at] = word->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    word->heap[at] = key;
}

static uint64_t heap_pop(MergeWord *word) {
    const uint64_t top = word->heap[0], last = word->heap[--word->held];
    int64_t at = 0;
    for (int64_t child = 1; child < word->held; child = 2 * at + 1) {
        child += child + 1 < word->held && word->heap[child + 1] < word->heap[child];
        if (word->heap[child] >= last) break;
        word->heap[at] = word->heap[child];
        at = child;
    }
    word->heap[at] = last;
    return top;
}

static void offer_pair(const MergeTable *table, MergeWord *word, int64_t place) {
    if (place < 0 || word->after[place] >= word->size) return;
    const int64_t rank = rank_of_pair(table, word->ids[place], word->ids[word->after[place]]);
    if (rank != NO_RANK) heap_push(word, (uint64_t)rank << 32 | (uint64_t)place);
}

static void merge_word(const MergeTable *table, MergeWord *word) {
    word->held = 0;
    for (int64_t i = 0; i < word->size; i++) word->after[i] = i + 1, word->before[i] = i - 1;
    for (int64_t i = 0; i < word->size; i++) offer_pair(table, word, i);
    while (word->held) {
        const uint64_t top = heap_pop(word);
        const int64_t place = (int64_t)(top & UINT32_MAX), right = word->after[place];
        const int64_t rank = (int64_t)(top >> 32);
        if (word->ids[place] == MERGED_AWAY || right >= word->size) continue;
        if (rank_of_pair(table, word->ids[place], word->ids[right]) != rank)
            continue; /* offered before a neighbour merged */
        word->ids[place] = table->merged[rank];
        word->ids[right] = MERGED_AWAY;
        word->after[place] = word->after[right];
        if (word->after[place] < word->size) word->before[word->after[place]] = place;
        offer_pair(table, word, word->before[place]);
        offer_pair(table, word, place);
    }
}

typedef struct {
    uint32_t *ids;
    int64_t *ends, words;
    const uint64_t *pairs;
    const uint32_t *ranks;
    int64_t number;
    const uint32_t *merged;
    int64_t *scratch, longest;
} MergeArguments;

/* Merge the ids of each word in place, move them together, and write the new ends. */
static void merge_pairs(Pool *pool, const Argument *arguments) {
    UNPACK(MergeArguments, a, arguments);
    const MergeTable table = {a.pairs, a.ranks, a.merged, a.number};
    int64_t start = 0, kept = 0;
    for (int64_t w = 0; w < a.words; w++) {
        MergeWord word = {
            .ids = a.ids + start,
            .size = a.ends[w] - start,
            .after = a.scratch,
            .before = a.scratch + a.longest,
            .heap = (uint64_t *)(a.scratch + 2 * a.longest),
        };
        start = a.ends[w];
        merge_word(&table, &word);
        for (int64_t i = 0; i < word.size; i++)
            if (word.ids[i] != MERGED_AWAY) a.ids[kept++] = word.ids[i];
        a.ends[w] = kept;
    }
}
