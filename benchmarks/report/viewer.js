// The report's mesh viewer: plain WebGL, no libraries. Meshes lie in the page as base64:
// uint32 V, uint32 F, float32 scale, int16 positions [3V], uint8 sRGB colours [3V], padding to 4, uint16|uint32 faces [3F].
"use strict";
const Viewer = (() => {
  const VERTEX = `attribute vec3 p, n, c; uniform mat4 m; uniform mat3 r; varying vec3 vn, vc;
    void main() { vn = r * n; vc = c; gl_Position = m * vec4(p, 1.0); }`;
  const FRAGMENT = `precision mediump float; varying vec3 vn, vc; uniform float mode;
    void main() {
      vec3 linear = pow(vc, vec3(2.2));
      vec3 n = normalize(vn);
      float light = max(0.0, dot(n, normalize(vec3(0.4, 0.6, 1.0))));
      vec3 lit = mode < 0.5 ? linear * (0.45 + 0.6 * light) : mode < 1.5 ? linear : vec3(0.7) * (0.35 + 0.65 * light);
      gl_FragColor = vec4(pow(lit, vec3(1.0 / 2.2)), 1.0);
    }`;
  let gl = null, program = null, mesh = null, buffers = {}, wide = false;
  let yaw = 0.5, pitch = 0.35, distance = 3.2, mode = 0;

  function shader(kind, text) {
    const s = gl.createShader(kind);
    gl.shaderSource(s, text);
    gl.compileShader(s);
    if (!gl.getShaderParameter(s, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(s));
    return s;
  }

  function start(canvas) {
    gl = canvas.getContext("webgl", { antialias: true, preserveDrawingBuffer: true });
    if (!gl) throw new Error("this browser has no WebGL");
    wide = !!gl.getExtension("OES_element_index_uint");
    program = gl.createProgram();
    gl.attachShader(program, shader(gl.VERTEX_SHADER, VERTEX));
    gl.attachShader(program, shader(gl.FRAGMENT_SHADER, FRAGMENT));
    gl.linkProgram(program);
    gl.useProgram(program);
    gl.enable(gl.DEPTH_TEST);
    for (const name of ["p", "n", "c", "f"]) buffers[name] = gl.createBuffer();
    let held = null;
    canvas.addEventListener("pointerdown", (e) => { held = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); });
    canvas.addEventListener("pointerup", () => { held = null; });
    canvas.addEventListener("pointermove", (e) => {
      if (!held) return;
      yaw -= 0.01 * (e.clientX - held[0]);
      pitch = Math.max(-1.5, Math.min(1.5, pitch + 0.01 * (e.clientY - held[1])));
      held = [e.clientX, e.clientY];
      draw();
    });
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      distance = Math.max(1.6, Math.min(8, distance * Math.exp(0.001 * e.deltaY)));
      draw();
    }, { passive: false });
  }

  function decode(text) {
    const raw = Uint8Array.from(atob(text.trim()), (ch) => ch.charCodeAt(0));
    const head = new DataView(raw.buffer);
    const V = head.getUint32(0, true), F = head.getUint32(4, true), scale = head.getFloat32(8, true);
    const quantised = new Int16Array(raw.buffer, 12, 3 * V);
    const positions = Float32Array.from(quantised, (q) => q * scale);
    const colours = raw.slice(12 + 6 * V, 12 + 9 * V);
    const at = 4 * Math.ceil((12 + 9 * V) / 4);
    const faces = V > 65535 ? new Uint32Array(raw.buffer, at, 3 * F) : new Uint16Array(raw.buffer, at, 3 * F);
    const normals = new Float32Array(3 * V);
    for (let f = 0; f < F; f++) {
      const [i, j, k] = [3 * faces[3 * f], 3 * faces[3 * f + 1], 3 * faces[3 * f + 2]];
      const u = [0, 1, 2].map((d) => positions[j + d] - positions[i + d]);
      const v = [0, 1, 2].map((d) => positions[k + d] - positions[i + d]);
      const n = [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
      for (const corner of [i, j, k]) for (let d = 0; d < 3; d++) normals[corner + d] += n[d];
    }
    return { V, F, positions, normals, colours, faces };
  }

  function attribute(name, data, type, normalised) {
    const place = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffers[name]);
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, 3, type, normalised, 0, 0);
  }

  function show(text) {
    mesh = decode(text);
    if (mesh.V > 65535 && !wide) throw new Error("this browser cannot index so many vertices");
    attribute("p", mesh.positions, gl.FLOAT, false);
    attribute("n", mesh.normals, gl.FLOAT, false);
    attribute("c", mesh.colours, gl.UNSIGNED_BYTE, true);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, buffers.f);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, mesh.faces, gl.STATIC_DRAW);
    draw();
    return { vertices: mesh.V, faces: mesh.F };
  }

  function draw() {
    const { width, height } = gl.canvas;
    gl.viewport(0, 0, width, height);
    gl.clearColor(0.66, 0.66, 0.66, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    if (!mesh) return;
    const [cy, sy, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
    const R = [cy, 0, -sy, -sp * sy, cp, -sp * cy, cp * sy, sp, cp * cy]; // rows: right, up, back
    const f = 2.4, near = 0.1, far = 20, aspect = width / height;
    const a = (far + near) / (near - far), b = 2 * far * near / (near - far);
    const M = new Float32Array(16);
    for (let c = 0; c < 3; c++) {
      M[4 * c] = f / aspect * R[c];
      M[4 * c + 1] = f * R[3 + c];
      M[4 * c + 2] = a * R[6 + c];
      M[4 * c + 3] = -R[6 + c];
    }
    M[14] = -a * distance + b;
    M[15] = distance;
    gl.uniformMatrix4fv(gl.getUniformLocation(program, "m"), false, M);
    gl.uniformMatrix3fv(gl.getUniformLocation(program, "r"), false,
      new Float32Array([R[0], R[3], R[6], R[1], R[4], R[7], R[2], R[5], R[8]]));
    gl.uniform1f(gl.getUniformLocation(program, "mode"), mode);
    gl.drawElements(gl.TRIANGLES, 3 * mesh.F, mesh.V > 65535 ? gl.UNSIGNED_INT : gl.UNSIGNED_SHORT, 0);
  }

  return {
    open(id, title) {
      const dialog = document.getElementById("viewer"), note = document.getElementById("viewer-note");
      document.getElementById("viewer-title").textContent = title;
      dialog.showModal();
      try {
        if (!gl) start(document.getElementById("viewer-canvas"));
        const size = show(document.getElementById(id).textContent);
        note.textContent = `${size.faces} faces here (simplified for this page). Drag to turn, wheel to zoom.`;
      } catch (error) {
        note.textContent = `cannot show the mesh: ${error.message}`;
      }
    },
    set(value) { mode = value; draw(); },
    turn(y, p) { yaw = y; pitch = p; draw(); },
    covered() {  // share of the canvas that is not background: what the browser test looks at
      const { width, height } = gl.canvas, pixels = new Uint8Array(4 * width * height);
      gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
      let count = 0;
      for (let i = 0; i < pixels.length; i += 4) {
        if (Math.abs(pixels[i] - 168) + Math.abs(pixels[i + 1] - 168) + Math.abs(pixels[i + 2] - 168) > 12) count++;
      }
      return count / (width * height);
    },
  };
})();
document.addEventListener("click", (event) => {
  const target = event.target.closest("[data-mesh]");
  if (target) Viewer.open(target.dataset.mesh, target.dataset.title);
});
