/* Encode pixels as a JPEG of any kind: what Pillow and libturbojpeg cannot ask for. */

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#include <jpeglib.h>

typedef struct {
    struct jpeg_error_mgr manager;
    jmp_buf failed;
} Errors;

static void fail(j_common_ptr info) { longjmp(((Errors *)info->err)->failed, 1); }

static struct jpeg_error_mgr *watch(Errors *errors) {
    jpeg_std_error(&errors->manager);
    errors->manager.error_exit = fail;
    return &errors->manager;
}

/* pixels: width x height of `components` bytes. factors: h and v of each component. space: the
   J_COLOR_SPACE of the file. Returns the size, 0 where libjpeg refuses; *data is to be freed by free_jpeg. */
unsigned long make_jpeg(const unsigned char *pixels, unsigned width, unsigned height,
                        int components, int input_space, int space, const int *factors,
                        int progressive, int arithmetic, int restart, unsigned char **data) {
    struct jpeg_compress_struct info;
    Errors errors;
    unsigned long size = 0;
    info.err = watch(&errors);
    if (setjmp(errors.failed)) {
        jpeg_destroy_compress(&info);
        return 0;
    }
    jpeg_create_compress(&info);
    *data = NULL;
    jpeg_mem_dest(&info, data, &size);
    info.image_width = width;
    info.image_height = height;
    info.input_components = components;
    info.in_color_space = input_space;
    jpeg_set_defaults(&info);
    jpeg_set_colorspace(&info, space);
    jpeg_set_quality(&info, 92, TRUE);
    for (int i = 0; i < info.num_components; i++) {
        info.comp_info[i].h_samp_factor = factors[2 * i];
        info.comp_info[i].v_samp_factor = factors[2 * i + 1];
    }
    info.arith_code = arithmetic;
    info.restart_interval = restart;
    if (progressive) jpeg_simple_progression(&info);
    jpeg_start_compress(&info, TRUE);
    while (info.next_scanline < height) {
        JSAMPROW row = (JSAMPROW)(pixels + (size_t)info.next_scanline * width * components);
        jpeg_write_scanlines(&info, &row, 1);
    }
    jpeg_finish_compress(&info);
    jpeg_destroy_compress(&info);
    return size;
}

void free_jpeg(unsigned char *data) { free(data); }

/* The whole picture as RGB at 1/shrink of its size, by libjpeg alone; -1 where it fails. */
int whole_jpeg(const unsigned char *data, unsigned long size, unsigned shrink, unsigned char *out) {
    struct jpeg_decompress_struct info;
    Errors errors;
    info.err = watch(&errors);
    if (setjmp(errors.failed)) {
        jpeg_destroy_decompress(&info);
        return -1;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, data, size);
    jpeg_read_header(&info, TRUE);
    info.out_color_space = JCS_RGB;
    info.scale_num = 1;
    info.scale_denom = shrink;
    jpeg_start_decompress(&info);
    while (info.output_scanline < info.output_height) {
        JSAMPROW row = out + 3UL * info.output_width * info.output_scanline;
        jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_destroy_decompress(&info);
    return 0;
}
