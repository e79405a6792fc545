/* The part of a JPEG that a crop shows, at 1/1, 1/2, 1/4 or 1/8 of its size: libjpeg-turbo leaves
   out the pixels of other rows and columns, and does not read what is below.

   In C, because libjpeg reports an error by a call that must not return. */

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

/* Colour is interpolated from its neighbours, so a crop needs more columns than it shows. */
enum { MARGIN = 2 };

/* In fewer columns jpeg_crop_scanline would interpolate in another way. */
enum { NARROW = 8 };

typedef struct {
    struct jpeg_error_mgr manager;
    jmp_buf failed;
} Errors;

static void fail(j_common_ptr info) { longjmp(((Errors *)info->err)->failed, 1); }

static void count(j_common_ptr info, int level) { info->err->num_warnings += level < 0; }

#if JPEG_LIB_VERSION < 70
#define DCT_h_scaled_size DCT_scaled_size
#define min_DCT_h_scaled_size min_DCT_scaled_size
#endif

/* Whether jpeg_crop_scanline is exact. It is not where the transform enlarges a component and
   leaves it smaller than others still, as it does at 1/2 and 1/4 with sampling 4x2 or 2x4. */
static int can_crop(const struct jpeg_decompress_struct *info) {
    for (int i = 0; i < info->num_components; i++) {
        const jpeg_component_info *part = &info->comp_info[i];
        int ratio = part->DCT_h_scaled_size / info->min_DCT_h_scaled_size;
        if (ratio > 1 && (part->h_samp_factor * ratio != info->max_h_samp_factor ||
                          part->v_samp_factor * ratio != info->max_v_samp_factor))
            return 0;
    }
    return 1;
}

/* Rows top to bottom and columns left to right (ends excluded) of a JPEG that has width x height
   pixels, all counted after shrinking. `pixels` receives the rows, `stride` bytes apart, beginning
   up to an MCU to the left: `left` is at column *found. Returns 0, or -1 where libjpeg failed or
   had to guess. */
int evit_jpeg_crop(const unsigned char *data, unsigned long size, unsigned width, unsigned height,
                   unsigned shrink, unsigned top, unsigned bottom, unsigned left, unsigned right,
                   unsigned char *pixels, unsigned long stride, unsigned *found) {
    struct jpeg_decompress_struct info;
    Errors errors;
    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = fail;
    errors.manager.emit_message = count;
    if (setjmp(errors.failed)) {
        jpeg_destroy_decompress(&info);
        return -1;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, data, size);
    jpeg_read_header(&info, TRUE);
    if (info.image_width != width || info.image_height != height) fail((j_common_ptr)&info);

    info.out_color_space = JCS_RGB;
    info.scale_num = 1;
    info.scale_denom = shrink;
    jpeg_start_decompress(&info);
    if (right > info.output_width || bottom > info.output_height) fail((j_common_ptr)&info);
    if (!can_crop(&info)) {
        JSAMPARRAY whole = info.mem->alloc_sarray((j_common_ptr)&info, JPOOL_IMAGE,
                                                  3 * info.output_width, 1);
        *found = 0;
        while (info.output_scanline < bottom) {
            jpeg_read_scanlines(&info, whole, 1);
            if (info.output_scanline <= top) continue;
            memcpy(pixels, whole[0] + 3 * left, 3 * (right - left));
            pixels += stride;
        }
        goto done;
    }
    JDIMENSION start = left < MARGIN ? 0 : left - MARGIN;
    JDIMENSION end = right + MARGIN < start + NARROW ? start + NARROW : right + MARGIN;
    if (end > info.output_width) end = info.output_width;
    JDIMENSION columns = end - start;
    jpeg_crop_scanline(&info, &start, &columns); /* moves start to the edge of an MCU */
    if (stride < 3UL * columns) fail((j_common_ptr)&info);
    *found = left - start;

    jpeg_skip_scanlines(&info, top);
    for (unsigned row = top; row < bottom; row++, pixels += stride)
        jpeg_read_scanlines(&info, &pixels, 1);
done:;
    int warnings = errors.manager.num_warnings;
    jpeg_destroy_decompress(&info);
    return warnings ? -1 : 0;
}
