{{- define "anychip.container" -}}
name: anychip
image: "{{ required "image.repository is empty: name an image in which anychip and the device's plugin are installed" .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [anychip]
args:
  {{- include "anychip.arguments" . | nindent 2 }}
env:
  - name: HOME
    value: /tmp
  - name: XDG_CACHE_HOME
    value: /cache
  - name: HF_HOME
    value: /cache/huggingface
  - name: TRITON_CACHE_DIR
    value: /cache/triton
  - name: ANYCHIP_LOG_FORMAT
    value: json
  {{- if .Values.admin.secretName }}
  - name: ANYCHIP_ADMIN_KEY
    valueFrom:
      secretKeyRef:
        name: {{ .Values.admin.secretName }}
        key: {{ .Values.admin.key }}
  {{- end }}
  {{- if .Values.huggingFace.tokenSecretName }}
  - name: HF_TOKEN
    valueFrom:
      secretKeyRef:
        name: {{ .Values.huggingFace.tokenSecretName }}
        key: {{ .Values.huggingFace.tokenKey }}
  {{- end }}
  {{- with .Values.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - name: http
    containerPort: {{ .Values.server.port | int64 }}
  {{- if .Values.admin.secretName }}
  - name: admin
    containerPort: {{ .Values.admin.port | int64 }}
  {{- end }}
{{- include "anychip.probes" . | nindent 0 }}
lifecycle:
  preStop:
    # Load balancers hear of the end when the server does. Until they have, connections come, and are served.
    sleep:
      seconds: {{ .Values.server.leaveSeconds | int64 }}
resources:
  {{- include "anychip.resources" . | nindent 2 }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
volumeMounts:
  {{- include "anychip.mounts" . | nindent 2 }}
{{- end }}

{{/* The server answers from the moment when its engine is ready, so a start fails /health by time-out. */}}
{{- define "anychip.probes" -}}
startupProbe:
  httpGet: {path: /health, port: http, scheme: {{ include "anychip.scheme" . }}}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: {{ divf .Values.probes.startupSeconds 5 | ceil | int64 }}
# Whether requests get on: it decides over traffic alone.
readinessProbe:
  httpGet: {path: /ready, port: http, scheme: {{ include "anychip.scheme" . }}}
  periodSeconds: 5
  timeoutSeconds: 4
  failureThreshold: 2
# The server replaces an engine that died by itself. Only a pod that cannot is restarted.
livenessProbe:
  httpGet: {path: /health, port: http, scheme: {{ include "anychip.scheme" . }}}
  periodSeconds: 10
  timeoutSeconds: 8
  failureThreshold: {{ divf .Values.probes.restartSeconds 10 | ceil | int64 }}
{{- end }}

{{- define "anychip.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- with include "anychip.deviceResource" . -}}
{{- $device := dict . ($.Values.device.count | int64) -}}
{{- $limits := merge (get $resources "limits" | default dict) $device -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end }}
